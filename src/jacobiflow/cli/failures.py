"""What is said of an error that ends a command."""

from __future__ import annotations

import re

import torch

_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory|DefaultCPUAllocator|bad_alloc|"
                     r"_ALLOC_FAILED|not enough memory", re.IGNORECASE)  # fmt: skip
_SIZE = re.compile(r"overflow", re.IGNORECASE)  # of sizes of tensors


def message_of(error: Exception, batched: bool) -> str | None:
    """The message for the user; `None` for a fault of the program. `batched` where the command has `--batch-size`."""
    text = str(error)
    runtime = type(error) is RuntimeError or isinstance(error, getattr(torch, "AcceleratorError", ()))
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or (runtime and _MEMORY.search(text)):
        return f"out of memory; {'give a smaller --batch-size' if batched else 'make room, or give smaller numbers'}"
    if isinstance(error, OverflowError) or (runtime and _SIZE.search(text)):
        return f"a number is too large ({text}); give a smaller one"
    if isinstance(error, RecursionError):
        return "folders or files are nested too deep; give others"
    if runtime and text.startswith("Symlink loop"):  # of Path.resolve before Python 3.13
        return f"{text}; remove the link, or give another path"
    return text if isinstance(error, ValueError | OSError) else None
