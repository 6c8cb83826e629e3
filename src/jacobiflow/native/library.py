"""The native library and its functions; no other module calls C.

The library comes from the wheel or the user's cache folder, or is compiled at first use.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacobiflow.errors import UnsupportedError
from jacobiflow.native import compiler
from jacobiflow.native.boundary import ChainArgs, GradientArgs, TransformerArgs, WeightCopy
from jacobiflow.native.tensors import is_plain, is_traced
from jacobiflow.utils.checks import format_value
from jacobiflow.utils.files import cache_folder, sha256, write_atomically

SWITCH = "JACOBIFLOW_NATIVE"  # environment variable; 0 turns native code off
SHIPPED = Path(__file__).parent / "lib"  # libraries of a wheel, made by hatch_build.py
_CPU = Path("/proc/cpuinfo")


class Library:
    """The compiled library in a file, and its functions. Raises OSError if it cannot be loaded.

    Attributes:
        path: The file.
        lanes: The number of float32 in a vector of its processor.
        has_fast_halves: Reading weights in 16-bit floating-point dtypes takes no longer than in float32.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._native = path, ctypes.CDLL(str(path))
        number, address = ctypes.c_int32, ctypes.c_void_p
        arguments: dict[str, tuple[Any, ...]] = {
            "store": (address, number, number, number), "solve_transformer": (address, number),
            "masked": (address, number), "masked_gradients": (address, number), "masked_sizes": (address, address),
        }  # fmt: skip
        for name, types in arguments.items():
            function = getattr(self._native, f"jacobiflow_{name}")  # An item would be another object at each access.
            function.argtypes, function.restype = types, ctypes.c_int64
        self.lanes: int = self._native.jacobiflow_lanes()
        self.has_fast_halves = self.lanes > 4 or platform.machine() in ("aarch64", "arm64")
        self._use_threads_of_pytorch()

    def padded(self, size: int, dtype: torch.dtype) -> int:
        """Returns the size rounded up to whole vectors of a dtype."""
        count = 4 * self.lanes // dtype.itemsize
        return -(-size // count) * count

    def store(self, weights: ctypes.Array[WeightCopy], source_format: int) -> bool:
        """Copies weights, all to one format; False if a number would change."""
        for num_threads in (torch.get_num_threads(), 1):  # Fewer threads are used if so many are not available.
            status = self._native.jacobiflow_store(weights, len(weights), source_format, num_threads)
            if status >= 0:
                return bool(status == 0)
        return False

    def solve_transformer(self, arguments: TransformerArgs, dtype: torch.dtype) -> None:
        """Solves tokens `start` to `stop` - 1."""
        self._call(self._native.jacobiflow_solve_transformer, arguments, dtype)

    def evaluate_chain(self, arguments: ChainArgs, dtype: torch.dtype) -> int:
        """Computes a chain. Returns the number of rows that are not finite."""
        return self._call(self._native.jacobiflow_masked, arguments, dtype)

    def differentiate_chain(self, arguments: GradientArgs, dtype: torch.dtype) -> None:
        """Computes the gradients of a chain."""
        self._call(self._native.jacobiflow_masked_gradients, arguments, dtype)

    def chain_sizes(self, arguments: ChainArgs) -> tuple[int, int]:
        """Returns the size of a chain's packed weights, and of its activations for each row."""
        sizes = (ctypes.c_int64 * 2)()
        if self._native.jacobiflow_masked_sizes(ctypes.byref(arguments), sizes):
            raise MemoryError("not enough memory for native code")
        return sizes[0], sizes[1]

    @staticmethod
    def _call(function: Any, arguments: TransformerArgs | ChainArgs | GradientArgs, dtype: torch.dtype) -> int:
        """Returns the result of a C++ function. If there are too few threads, one thread computes it."""
        result: int = function(ctypes.byref(arguments), dtype is torch.float64)
        if result < 0:
            call = ChainArgs.from_address(arguments.chain) if isinstance(arguments, GradientArgs) else arguments
            call.num_threads = call.num_teams = 1  # A chain has no teams.
            result = function(ctypes.byref(arguments), dtype is torch.float64)
        if result < 0:
            raise MemoryError("not enough memory for native code: use a smaller batch")
        return result

    def _use_threads_of_pytorch(self) -> None:
        """Gives the library the OpenMP functions that PyTorch has loaded, if it has any."""
        if platform.system() == "Linux":
            pytorch = ctypes.CDLL(torch._C.__file__)  # it also finds functions of the libraries that PyTorch needs
            names = ("GOMP_parallel", "omp_get_num_threads", "omp_get_thread_num")
            with suppress(AttributeError):
                addresses = [ctypes.cast(getattr(pytorch, name), ctypes.c_void_p) for name in names]
                self._native.jacobiflow_use_openmp((ctypes.c_void_p * len(names))(*addresses))


def load_library() -> Library | None:
    """Returns the native library, or `None` if it cannot be compiled here or the environment has JACOBIFLOW_NATIVE=0.

    A wheel has it for several kinds of processor. Otherwise the first call says that it compiles it, and stores it in
    the user's cache folder.
    """
    return None if _is_off() else compiled_library()


def compiled_library() -> Library | None:
    """Returns the native library whatever the environment says, for callers of `load_library` or `usable_library`."""
    return _load_or_explain()[0]


def library_name() -> str | None:
    """Returns the name of the library's file, which differs between versions, or `None` without a library."""
    native = load_library()
    return None if native is None else native.path.name


def describe() -> str:
    """Returns a line about the native library: its vector width, or why it is missing and what to do."""
    return f"off, by {SWITCH}=0" if _is_off() else _load_or_explain()[1]


def usable_library(z: Tensor) -> Library:
    """Returns the library for `z`.

    Raises:
        UnsupportedError: If there is no library, `z` is not a plain tensor on a CPU, or PyTorch traces or casts.
    """
    if not (is_plain(z, torch.float32) or is_plain(z, torch.float64)):
        raise UnsupportedError(f"native code takes plain float32 or float64 tensors on a CPU, not {format_value(z)}")
    if is_traced() or torch.is_autocast_enabled("cpu"):
        raise UnsupportedError("native code does not run under autocast, tracing, or hooks on all modules")
    native = load_library()
    if native is None:
        raise UnsupportedError(f"native code is {describe()}")
    return native


def _is_off() -> bool:
    return os.environ.get(SWITCH) == "0"


@functools.cache
def _load_or_explain() -> tuple[Library | None, str]:
    """Returns the library, or `None`, and a line about it."""
    if platform.system() not in ("Linux", "Darwin"):
        return None, "none: they are for Linux and macOS"
    try:
        native = _find_or_compile()
    except (OSError, subprocess.SubprocessError) as error:
        # The first line of a compiler's long message has the reason.
        reason = str(getattr(error, "stderr", None) or error).strip().partition("\n")[0]
        return None, f"none: {reason}; install a C++ compiler, or name it in CXX, for faster exact loops"
    width = {16: "AVX-512", 8: "AVX2"}.get(native.lanes, "128-bit vectors")
    is_shipped = native.path.parent == SHIPPED
    return native, f"compiled for {width}{', in the wheel' if is_shipped else ''}"


def _find_or_compile() -> Library:
    """Returns the library of the wheel or of the cache folder, or compiles it and, if possible, stores it there."""
    instructions = _instructions()
    shipped, name = compiler.find_compiled(SHIPPED, platform.machine(), instructions), _name(instructions)
    folder = _private_folder()
    stored = [] if folder is None else sorted(folder.glob(f"{name}-*.so"))
    for path in (shipped, *stored):
        with suppress(OSError):  # the system cannot load the file, as its own libraries may be too old
            if path is not None and (path is shipped or path.stem.endswith(_digest(path))):
                return Library(path)
    with tempfile.TemporaryDirectory(prefix="jacobiflow-", ignore_cleanup_errors=True) as temporary:
        compiled = Path(temporary, f"{name}.so")
        compiler.find_compiler()  # Raises if there is none.
        logging.getLogger("jacobiflow").warning("jacobiflow compiles its native code once; that takes up to a minute")
        compiler.compile_library(compiled)
        with suppress(OSError):
            if folder is not None:
                path = folder / f"{name}-{_digest(compiled)}.so"
                write_atomically(path, compiled.read_bytes())
                return Library(path)
        return Library(compiled)  # a loaded file may be removed


def _digest(path: Path) -> str:
    """Returns the hash in the name of a stored library. Loading a file that was cut short would kill the process."""
    return sha256(path)[:32]


def _private_folder() -> Path | None:
    """Returns the cache folder for libraries, or `None` if other users can write to it."""
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
    """Returns the processor's instructions by Linux's names. They are empty on other systems."""
    with suppress(OSError):
        flags = re.search(r"^(?:flags|Features)\s*:(.*)$", _CPU.read_text(), re.MULTILINE)
        return set(flags[1].split()) if flags else set()
    return set()


def _name(instructions: Collection[str]) -> str:
    """Returns a name for these sources, compiled for this system and processor."""
    target = (platform.system(), platform.machine(), *sorted(instructions), compiler.fingerprint())
    return f"native-{sha256(' '.join(target).encode())[:32]}"
