"""Compiles the native sources: for this machine, or for every kind of processor that a wheel serves.

It imports nothing of the package, so that the hook that builds a wheel can run it where nothing is installed yet.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent
# By processor, the best first: the instructions that a library of a wheel needs, under the names that they have in
# /proc/cpuinfo and, after -m, as flags of a compiler.
TARGETS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma"),
        "avx2": ("avx2", "fma"),
        "sse2": (),
    },
    "aarch64": {"neon": ()},
    "arm64": {"neon": ()},
}
# By -mtune=generic the loops are some percent slower, on AMD's processors too.
_TUNING = {"x86_64": ("-mtune=skylake",)}
FLAGS = (
    "-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fvisibility-inlines-hidden",
    "-pthread",
)  # fmt: skip
_SHARED = ("-shared", "-fPIC")
_COMPILERS = ("c++", "g++", "clang++")


def compile_library(path: Path, target: tuple[str, ...] | None = None) -> None:
    """Compiles the sources to `path`, for the instructions of the flags `target`, by default those of this machine.

    Raises:
        OSError: If there is no compiler.
        subprocess.SubprocessError: If it fails.
    """
    flags = (*FLAGS, *_SHARED, *(_machine() if target is None else target))
    sources = map(str, sorted(FOLDER.glob("*.cpp")))
    command = (_compiler(), *flags, *sources, "-o", str(path))
    subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=300)


def compile_targets(folder: Path) -> list[Path]:
    """Compiles the library for each target of this machine's processor, to the files of `folder` that `best` looks for.

    Raises:
        OSError: If there is no compiler.
        subprocess.SubprocessError: If it fails.
    """
    machine = platform.machine()
    targets, tuning = TARGETS.get(machine, {}), _TUNING.get(machine, ())
    paths = [_path(folder, name) for name in targets]
    flags = [(*(f"-m{name}" for name in instructions), *tuning) for instructions in targets.values()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_library, paths, flags))
    return paths


def best(folder: Path, machine: str, instructions: Container[str]) -> Path | None:
    """The file in `folder` of the best target that a processor can run; `None` if there is no such file.

    Args:
        folder: Holds files of `compile_targets`.
        machine: The processor's name, as `platform.machine` gives it.
        instructions: Names of /proc/cpuinfo for what the processor can do.
    """
    for name, needed in TARGETS.get(machine, {}).items():
        path = _path(folder, name)
        if all(instruction in instructions for instruction in needed) and path.is_file():
            return path
    return None


def fingerprint() -> str:
    """A hash of the sources and flags."""
    digest = hashlib.sha256(" ".join((*FLAGS, *_SHARED)).encode())
    for path in sorted((*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def _path(folder: Path, target: str) -> Path:
    """The file of a target, under a name that other sources do not have."""
    return folder / f"{target}-{fingerprint()}.so"


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), *_COMPILERS)):
        if (path := shutil.which(name)) is not None:
            return path
    raise FileNotFoundError("no C++ compiler found")


def _machine() -> tuple[str, ...]:
    """The flag for all instructions of this machine's processor."""
    return ("-mcpu=native",) if platform.machine() in ("arm64", "aarch64") else ("-march=native",)
