"""Compiles the C++ sources for this machine, or for all kinds of processor that a wheel supports.

It imports nothing of the package, because the hook that builds a wheel runs it before anything is installed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import runpy
import shutil
import subprocess
from collections.abc import Callable, Container
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

SOURCES = Path(__file__).parent / "src"
_BOUNDARY = Path(__file__).parent / "boundary.py"
# What is compiled at once: a file, for a type of number.
_UNITS = (("library.cpp", "float"), *product(("masked.cpp", "transformer.cpp"), ("float", "double")))
# The libraries of a wheel for each processor, the fastest first, and the instructions that each needs. Their names are
# those of /proc/cpuinfo, which a compiler takes after -m.
TARGETS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma"),
        "avx2": ("avx2", "fma", "f16c"),
        "sse2": (),
    },
    "aarch64": {"neon": ()},
    "arm64": {"neon": ()},
}
# The tuning of a processor with AVX-512, in place of -mtune=generic, also for processors of AMD.
_TUNING = {"x86_64": ("-mtune=skylake",)}
# Without hidden visibility, the libraries of two targets in one process would share inline data, such as the number of
# lanes.
FLAGS = (
    "-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden",
    "-fvisibility-inlines-hidden", "-pthread", "-fPIC",
)  # fmt: skip


def compile_library(path: Path, target: tuple[str, ...] | None = None) -> None:
    """Compiles the sources to a shared library, if C++ has the structures of boundary.py.

    Args:
        target: Flags of the processor. By default, all of this machine's instructions are used.

    Raises:
        OSError: If there is no compiler.
        subprocess.SubprocessError: If the compiler fails.
    """
    if target is None:
        target = ("-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native",)
    command = (find_compiler(), *FLAGS, *target)
    _run((*command, f"-I{SOURCES}", "-fsyntax-only", "-x", "c++", "-"), _layout_assertions())
    with TemporaryDirectory(prefix="jacobiflow-") as folder, ThreadPoolExecutor(len(_UNITS)) as pool:
        objects = [Path(folder, f"{source}-{number}.o") for source, number in _UNITS]
        commands = [
            (*command, f"-DNUMBER={number}", "-c", SOURCES / source, "-o", object_file)
            for (source, number), object_file in zip(_UNITS, objects, strict=True)
        ]
        list(pool.map(_run, commands))
        _run((*command, "-shared", *objects, "-o", path))


def compile_targets(folder: Path) -> list[Path]:
    """Compiles the library for each target of this machine's processor, to the files of `find_compiled`."""
    machine = platform.machine()
    targets, tuning = TARGETS.get(machine, {}), _TUNING.get(machine, ())
    paths = [_path(folder, name) for name in targets]
    for path, instructions in zip(paths, targets.values(), strict=True):
        compile_library(path, (*(f"-m{name}" for name in instructions), *tuning))
    return paths


def find_compiled(folder: Path, machine: str, instructions: Container[str]) -> Path | None:
    """Returns the file in `folder` for the fastest target that a processor can run, or `None`."""
    for name, needed in TARGETS.get(machine, {}).items():
        path = _path(folder, name)
        if all(instruction in instructions for instruction in needed) and path.is_file():
            return path
    return None


def fingerprint() -> str:
    """Returns a hash of the sources, flags and structures. A process reads them once, when it first needs the hash."""
    return _hash_sources(SOURCES)


@cache
def _hash_sources(folder: Path) -> str:
    digest = hashlib.sha256(" ".join((*FLAGS, _layout_assertions())).encode())
    for path in sorted((*folder.glob("*.cpp"), *folder.glob("*.h"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def _path(folder: Path, target: str) -> Path:
    """Returns the file of a target. Its name depends on the sources."""
    return folder / f"{target}-{fingerprint()}.so"


def find_compiler() -> str:
    """Returns the path of the C++ compiler; raises FileNotFoundError if there is none."""
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if (path := shutil.which(name)) is not None:
            return path
    raise FileNotFoundError("no C++ compiler found")


def _layout_assertions() -> str:
    """Returns `layout_assertions` of boundary.py, which may be run without the package."""
    layout_assertions: Callable[[], str] = runpy.run_path(str(_BOUNDARY))["layout_assertions"]
    return layout_assertions()


def _run(command: tuple[str | Path, ...], source: str | None = None) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=300, input=source)
