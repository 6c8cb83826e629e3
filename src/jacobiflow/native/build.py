"""The library of native recurrences: from the wheel, or compiled at first use and kept in the user's cache folder."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
import stat
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from jacobiflow.files import cache_folder, sha256, write_beside
from jacobiflow.native import compiler
from jacobiflow.native.structures import STRUCTURES

SWITCH = "JACOBIFLOW_NATIVE"  # environment variable: 0 leaves all recurrences to PyTorch
SHIPPED = Path(__file__).parent / "lib"  # of a wheel, made by hatch_build.py
_CPU = Path("/proc/cpuinfo")
# Lines of it that tell processors apart. Others, such as the clock's rate, change all the time.
_INSTRUCTIONS = re.compile(
    r"(vendor_id|cpu|cpu family|model|flags|[Ff]eatures|CPU (implementer|architecture|variant|part)|isa)\s*:"
)


class TarFlowArguments(ctypes.Structure):
    """`TarFlow` of tarflow.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "z", "position", "classes", "query_scale", "proj_in", "proj_out", "out_bias", "weight_scale",
            "weight_shift", "layers", "x", "keys_values",
        )),
        *((name, ctypes.c_int32) for name in (
            "samples", "networks", "tokens", "values", "channels", "hidden", "heads", "depth", "scales", "threads",
            "teams", "start", "stop",
        )),
    )  # fmt: skip


@dataclass(frozen=True)
class _Loaded:
    """The library, or `None`; and a line about it."""

    library: ctypes.CDLL | None
    line: str


def library() -> ctypes.CDLL | None:
    """The compiled library; `None` where it cannot be compiled, or the environment has JACOBIFLOW_NATIVE=0.

    A wheel brings it for several kinds of processor. Elsewhere, as in a clone, the first call on a machine compiles it,
    which takes a few seconds. The result is kept in the user's cache folder under a name that stands for the sources
    and the processor, so that neither a new version nor another machine finds it, and for its own content, so that a
    damaged file is compiled anew. Once it is there, no compiler is needed. Processes that compile at the same time each
    write a file of their own, and rename it. A folder or file that others could have written to is not used.
    """
    return None if _is_off() else _loaded().library


def library_name() -> str | None:
    """The name of the library's file, which no other version of it has; `None` if there is no library."""
    loaded = library()
    return None if loaded is None else os.path.basename(loaded._name)


def describe() -> str:
    """A line about the native recurrences: what they were compiled for, or why there are none and what to do."""
    return f"off, by {SWITCH}=0" if _is_off() else _loaded().line


def load_library(path: Path) -> ctypes.CDLL:
    """The library that `compile_library` wrote.

    **Raises** `OSError` where the system cannot load it, `RuntimeError` if its structures are not those of this module.
    """
    found = ctypes.CDLL(str(path))
    for name, structure in {"tarflow": TarFlowArguments, **STRUCTURES}.items():
        if (here := ctypes.sizeof(structure)) != (there := found[f"jacobiflow_{name}_size"]()):
            raise RuntimeError(f"{path}: {structure.__name__} is of {here} bytes here, and of {there} in C++")
    number, address = ctypes.c_int32, ctypes.c_void_p
    found.jacobiflow_pack.argtypes = (address, number, number, address, number)
    found.jacobiflow_masked.argtypes, found.jacobiflow_masked.restype = (address, number), ctypes.c_int64
    _use_threads_of_pytorch(found)
    return found


def _is_off() -> bool:
    return os.environ.get(SWITCH) == "0"


@functools.cache
def _loaded() -> _Loaded:
    if platform.system() not in ("Linux", "Darwin"):
        return _Loaded(None, "none: they are for Linux and macOS")
    shipped = _shipped()
    try:
        found = shipped or _found_or_compiled()
    except (OSError, subprocess.SubprocessError) as error:
        # A message of a compiler is long, and says what is wrong in its first line.
        reason = str(getattr(error, "stderr", None) or error).strip().partition("\n")[0]
        return _Loaded(None, f"none: {reason}; install a C++ compiler, or name it in CXX, for faster exact loops")
    width = {16: "AVX-512", 8: "AVX2"}.get(found.jacobiflow_lanes(), "128-bit vectors")
    return _Loaded(found, f"compiled for {width}" + (", in the wheel" if shipped else ""))


def _use_threads_of_pytorch(library: ctypes.CDLL) -> None:
    """Gives the library the OpenMP functions that PyTorch has loaded, if it has any."""
    if platform.system() == "Linux":
        pytorch = ctypes.CDLL(torch._C.__file__)  # functions of the libraries that it needs are found in it too
        names = ("GOMP_parallel", "omp_get_num_threads", "omp_get_thread_num")
        with suppress(AttributeError):
            addresses = [ctypes.cast(getattr(pytorch, name), ctypes.c_void_p) for name in names]
            library.jacobiflow_use_openmp((ctypes.c_void_p * len(names))(*addresses))


def _shipped() -> ctypes.CDLL | None:
    """The library of the wheel for this processor; `None` if there is none, or this system cannot load it."""
    path = compiler.best(SHIPPED, platform.machine(), _available_instructions())
    with suppress(OSError):
        return None if path is None else load_library(path)
    return None


def _available_instructions() -> set[str]:
    """The processor's instructions by Linux's names; empty on other systems."""
    with suppress(OSError):
        flags = re.search(r"^flags\s*:(.*)$", _CPU.read_text(), re.MULTILINE)
        return set(flags[1].split()) if flags else set()
    return set()


def _found_or_compiled() -> ctypes.CDLL:
    """The library from the cache folder, or compiled, and then kept there if possible."""
    folder, name = _folder(), _name()
    if folder is not None:
        for path in folder.glob(f"{name}-*.so"):
            with suppress(OSError):  # such as one that another version of the system's libraries was linked with
                if path.is_file() and _is_ours(path) and path == _path(folder, name, path.read_bytes()):
                    return load_library(path)
    with tempfile.TemporaryDirectory(prefix="jacobiflow-", ignore_cleanup_errors=True) as private:
        path = Path(private) / f"{name}.so"
        compiler.compile_library(path)
        with suppress(OSError):
            if folder is not None:
                return load_library(_keep(folder, name, path.read_bytes()))
        return load_library(path)  # a loaded file may be removed


def _name() -> str:
    """A name for what a compiler makes of these sources for this processor and system."""
    target = (platform.system(), platform.machine(), str(ctypes.sizeof(ctypes.c_void_p)), _processor())
    return f"recurrences-{sha256(' '.join(target).encode(), compiler.fingerprint().encode())[:32]}"


def _processor() -> str:
    """The processor's model and instructions, of which the compiler uses all."""
    if platform.system() == "Darwin":
        command = ("/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string")
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    first, _, _ = _CPU.read_text().partition("\n\n")
    return "\n".join(line for line in first.splitlines() if _INSTRUCTIONS.match(line))


def _path(folder: Path, name: str, content: bytes) -> Path:
    return folder / f"{name}-{sha256(content)[:32]}.so"


def _keep(folder: Path, name: str, content: bytes) -> Path:
    """Write the library to the folder. **Raises** `OSError` where that is not possible."""
    path = _path(folder, name, content)
    with write_beside(path) as partial:
        partial.touch(mode=0o600)  # or a file of a user with a umask of 002 could be written by others
        partial.write_bytes(content)
    return path


def _folder() -> Path | None:
    """The folder of libraries, made if need be; `None` where there can be none that this user alone can write to."""
    cache = cache_folder()
    if cache is None:
        return None
    folder = cache / "native"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder if _is_ours(folder) else None
    except OSError:
        return None


def _is_ours(path: Path) -> bool:
    """Whether this user alone can write to it."""
    found = path.stat()
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
