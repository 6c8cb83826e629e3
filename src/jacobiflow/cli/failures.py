"""The one line that a command ends with if the caller, or the machine, can put it right."""

from __future__ import annotations

import re

import torch

from jacobiflow.errors import InputError

_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory|DefaultCPUAllocator|bad_alloc|"
                     r"_ALLOC_FAILED|not enough memory", re.IGNORECASE)  # fmt: skip


def message_of(error: Exception, batched: bool) -> str | None:
    """The message for the user; `None` for a fault of the library, which keeps its traceback.

    Input errors, files that the system refuses, and lack of memory have one. `batched`: the command has `--batch-size`.
    """
    if isinstance(error, InputError | OSError):
        return str(error)
    runtime = type(error) is RuntimeError or isinstance(error, getattr(torch, "AcceleratorError", ()))
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or (runtime and _MEMORY.search(str(error))):
        return f"out of memory; {'give a smaller --batch-size' if batched else 'make room, or give smaller numbers'}"
    return None
