"""The native library: from the wheel, from the user's cache folder, or compiled at first use."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from jacobiflow.files import cache_folder, sha256, write_atomically
from jacobiflow.native import compiler

SWITCH = "JACOBIFLOW_NATIVE"  # environment variable: 0 leaves all recurrences to PyTorch
SHIPPED = Path(__file__).parent / "lib"  # of a wheel, made by hatch_build.py
_CPU = Path("/proc/cpuinfo")


class TarFlowArguments(ctypes.Structure):
    """`TarFlow` of tarflow.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "z", "position", "context", "query_scale", "proj_in", "proj_out", "out_bias", "weight_scale",
            "weight_shift", "prefix_keys_values", "prefix_hidden", "rotation", "final_norm", "layers", "x",
            "keys_values", "log_det",
        )),
        *((name, ctypes.c_int32) for name in (
            "samples", "networks", "tokens", "values", "channels", "hidden", "heads", "depth", "scales", "context_row",
            "context_token", "prefix", "by_density", "threads", "teams", "start", "stop",
        )),
        ("soft_clip", ctypes.c_float),
    )  # fmt: skip


def library() -> ctypes.CDLL | None:
    """Returns the native library; `None` if it cannot be compiled here, or the environment has JACOBIFLOW_NATIVE=0.

    A wheel brings it for several kinds of processor. Elsewhere the first call compiles it, which takes some seconds,
    and stores it in the user's cache folder.
    """
    return None if _is_off() else _loaded()[0]


def library_name() -> str | None:
    """Returns the name of the library's file, which no other version of it has; `None` if there is no library."""
    native = library()
    return None if native is None else os.path.basename(native._name)


def describe() -> str:
    """Returns a line about the native library: its vector width, or why there is none and what to do."""
    return f"off, by {SWITCH}=0" if _is_off() else _loaded()[1]


def usable(*tensors: Tensor) -> ctypes.CDLL | None:
    """Returns the library if it can compute with these: plain, float32, on a CPU, without autocast; else `None`."""
    plain = all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
    if not plain or any(tensor.dtype != torch.float32 or tensor.device.type != "cpu" for tensor in tensors):
        return None
    return None if torch.is_autocast_enabled("cpu") else library()


def pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    """Returns an array of the tensors' addresses, null for `None`; they must live as long as it is used."""
    return (ctypes.c_void_p * len(tensors))(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))


def load_library(path: Path) -> ctypes.CDLL:
    """Loads a library that `compile_library` wrote."""
    native = ctypes.CDLL(str(path))
    number, address = ctypes.c_int32, ctypes.c_void_p
    native.jacobiflow_pack.argtypes = (address, number, number, address, number)
    native.jacobiflow_masked.argtypes, native.jacobiflow_masked.restype = (address, number), ctypes.c_int64
    _use_threads_of_pytorch(native)
    return native


def _is_off() -> bool:
    return os.environ.get(SWITCH) == "0"


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    """The library, or `None`; and a line about it."""
    if platform.system() not in ("Linux", "Darwin"):
        return None, "none: they are for Linux and macOS"
    try:
        native = _find_or_compile()
    except (OSError, subprocess.SubprocessError) as error:
        # A compiler says what is wrong in the first line of a long message.
        reason = str(getattr(error, "stderr", None) or error).strip().partition("\n")[0]
        return None, f"none: {reason}; install a C++ compiler, or name it in CXX, for faster exact loops"
    width = {16: "AVX-512", 8: "AVX2"}.get(native.jacobiflow_lanes(), "128-bit vectors")
    is_shipped = Path(native._name).parent == SHIPPED
    return native, f"compiled for {width}{', in the wheel' if is_shipped else ''}"


def _find_or_compile() -> ctypes.CDLL:
    """The library of the wheel, else of the cache folder, else compiled and, if possible, stored there."""
    instructions = _instructions()
    shipped, name = compiler.best(SHIPPED, platform.machine(), instructions), _name(instructions)
    folder = _private_folder()
    stored = None if folder is None else folder / name
    for path in (shipped, stored):
        with suppress(OSError):  # the system cannot load it, since its own libraries are too old, say
            if path is not None and path.is_file():
                return load_library(path)
    with tempfile.TemporaryDirectory(prefix="jacobiflow-", ignore_cleanup_errors=True) as temporary:
        compiled = Path(temporary, name)
        compiler.compile_library(compiled)
        with suppress(OSError):
            if stored is not None:
                write_atomically(stored, compiled.read_bytes())
                return load_library(stored)
        return load_library(compiled)  # a loaded file may be removed


def _private_folder() -> Path | None:
    """The cache folder for libraries; `None` if there is none that only this user can write to."""
    cache = cache_folder()
    if cache is None:
        return None
    folder = cache / "native"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError:
        return None
    return folder if status.st_uid == os.getuid() and not status.st_mode & 0o022 else None


def _instructions() -> Collection[str]:
    """The processor's instructions by Linux's names; empty on other systems."""
    with suppress(OSError):
        flags = re.search(r"^(?:flags|Features)\s*:(.*)$", _CPU.read_text(), re.MULTILINE)
        return set(flags[1].split()) if flags else set()
    return set()


def _name(instructions: Collection[str]) -> str:
    """A name for what a compiler makes of these sources for this system and processor."""
    target = (platform.system(), platform.machine(), *sorted(instructions), compiler.fingerprint())
    return f"recurrences-{sha256(' '.join(target).encode())[:32]}.so"


def _use_threads_of_pytorch(native: ctypes.CDLL) -> None:
    """Gives the library the OpenMP functions that PyTorch has loaded, if it has any."""
    if platform.system() == "Linux":
        pytorch = ctypes.CDLL(torch._C.__file__)  # functions of the libraries that it needs are found in it too
        names = ("GOMP_parallel", "omp_get_num_threads", "omp_get_thread_num")
        with suppress(AttributeError):
            addresses = [ctypes.cast(getattr(pytorch, name), ctypes.c_void_p) for name in names]
            native.jacobiflow_use_openmp((ctypes.c_void_p * len(names))(*addresses))
