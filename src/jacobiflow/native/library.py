"""The native library: from the wheel, from the user's cache folder, or compiled at first use."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from jacobiflow.native import compiler
from jacobiflow.native.boundary import Library, is_plain, is_traced
from jacobiflow.utils.files import cache_folder, sha256, write_atomically

SWITCH = "JACOBIFLOW_NATIVE"  # environment variable: 0 leaves all recurrences to PyTorch
SHIPPED = Path(__file__).parent / "lib"  # of a wheel, made by hatch_build.py
_CPU = Path("/proc/cpuinfo")


def load_library() -> Library | None:
    """Returns the native library; `None` if it cannot be compiled here, or the environment has JACOBIFLOW_NATIVE=0.

    A wheel brings it for several kinds of processor. Elsewhere the first call compiles it, which takes some seconds,
    and stores it in the user's cache folder.
    """
    return None if _is_off() else _loaded()[0]


def library_name() -> str | None:
    """Returns the name of the library's file, which no other version of it has; `None` if there is no library."""
    native = load_library()
    return None if native is None else native.path.name


def describe() -> str:
    """Returns a line about the native library: its vector width, or why there is none and what to do."""
    return f"off, by {SWITCH}=0" if _is_off() else _loaded()[1]


def usable_library(z: Tensor) -> Library | None:
    """Returns the library if it can solve for `z`: plain, on a CPU, not traced or autocast; else `None`."""
    is_float = is_plain(z, torch.float32) or is_plain(z, torch.float64)
    return load_library() if is_float and not is_traced() and not torch.is_autocast_enabled("cpu") else None


def _is_off() -> bool:
    return os.environ.get(SWITCH) == "0"


@functools.cache
def _loaded() -> tuple[Library | None, str]:
    """The library, or `None`; and a line about it."""
    if platform.system() not in ("Linux", "Darwin"):
        return None, "none: they are for Linux and macOS"
    try:
        native = _find_or_compile()
    except (OSError, subprocess.SubprocessError) as error:
        # A compiler says what is wrong in the first line of a long message.
        reason = str(getattr(error, "stderr", None) or error).strip().partition("\n")[0]
        return None, f"none: {reason}; install a C++ compiler, or name it in CXX, for faster exact loops"
    width = {16: "AVX-512", 8: "AVX2"}.get(native.lanes, "128-bit vectors")
    is_shipped = native.path.parent == SHIPPED
    return native, f"compiled for {width}{', in the wheel' if is_shipped else ''}"


def _find_or_compile() -> Library:
    """The library of the wheel, else of the cache folder, else compiled and, if possible, stored there."""
    instructions = _instructions()
    shipped, name = compiler.best(SHIPPED, platform.machine(), instructions), _name(instructions)
    folder = _private_folder()
    stored = [] if folder is None else sorted(folder.glob(f"{name}-*.so"))
    for path in (shipped, *stored):
        with suppress(OSError):  # the system cannot load it, since its own libraries are too old, say
            if path is not None and (path is shipped or path.stem.endswith(_digest(path))):
                return Library(path)
    with tempfile.TemporaryDirectory(prefix="jacobiflow-", ignore_cleanup_errors=True) as temporary:
        compiled = Path(temporary, f"{name}.so")
        compiler.compile_library(compiled)
        with suppress(OSError):
            if folder is not None:
                path = folder / f"{name}-{_digest(compiled)}.so"
                write_atomically(path, compiled.read_bytes())
                return Library(path)
        return Library(compiled)  # a loaded file may be removed


def _digest(path: Path) -> str:
    """The hash that ends the name of a stored library: loading a file that was cut short would kill the process."""
    return sha256(path)[:32]


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
    return f"recurrences-{sha256(' '.join(target).encode())[:32]}"
