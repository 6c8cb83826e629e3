"""How much memory there is, and what sweeps free and need again."""

from __future__ import annotations

import functools
import os

import torch


def shortage(needed: int) -> str | None:
    """Words that say that `needed` bytes are more memory than this machine has; `None` where it has as much."""
    try:
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on every system
        return None
    words = (f"{amount / 2**30:,.1f} GiB" for amount in (needed, have))
    return f"{next(words)} of memory, and this machine has {next(words)}" if needed > have else None


def keep_freed_memory(device: torch.device) -> None:
    """Let the process keep what it frees on a CPU, which sweeps would else spend up to a quarter of their time on.

    glibc returns memory to the system above twice the size of the largest block that was freed so far, and gets it
    anew, to be cleared, at the next layer. The largest size that counts is 32 MB; nothing is written to this one.
    """
    if device.type == "cpu":
        _free_a_large_block()


@functools.cache
def _free_a_large_block() -> None:
    torch.empty(2**25 - 2**16, dtype=torch.uint8)
