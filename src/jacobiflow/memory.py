"""The memory of a process, of a batch, and the largest batch that fits."""

from __future__ import annotations

import ctypes
import os

import torch

from jacobiflow.checks import check_count
from jacobiflow.errors import InputValueError
from jacobiflow.flows.flow import Flow, check_flow

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # in malloc.h
_SHARE = 0.8  # of the free memory that a batch may take: what is freed is not all used again
_STATES = 12  # arrays of tokens that a solve holds at a time


def keep_freed_memory() -> None:
    """Lets this process keep the memory that it frees, which can save a quarter of its time on a CPU.

    By default glibc returns freed megabytes to the system, and gets them anew, to be cleared, at the next layer. The
    command line calls this; the library does not, since it concerns all that the process does.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_MMAP_THRESHOLD, 2**25)


def free_memory(device: torch.device) -> int | None:
    """Returns the bytes that are free on the device, or on this machine; `None` if not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on every system
        return None


def batch_bytes(flow: Flow, num: int) -> int | None:
    """Estimates the bytes that `num` samples take at most beside the weights; `None` if the flow does not say.

    By the shapes: keys and values, twice under guidance, what a sweep of all tokens makes, and the tokens.
    """
    check_flow(flow)
    row, config = flow.blocks[0].row_bytes(), flow.config
    if row is None:
        return None
    tokens = _STATES * config.num_tokens * config.token_channels * max(flow.var.element_size(), 4)
    return check_count("num", num) * (tokens + row * (1 if flow.guidance is None else 2))


def exceeds_memory(flow: Flow, num: int) -> bool:
    """Tells if `num` samples need more than four fifths of the free memory; False if that is not known."""
    needed, free = batch_bytes(flow, num), free_memory(flow.var.device)
    return needed is not None and free is not None and needed > _SHARE * free


def fitting_batch(flow: Flow, most: int) -> int:
    """Finds the largest power of two, or else `most`, of samples that fit in four fifths of the free memory.

    Raises ValueError if not even one does, or if the flow or the system does not say how much memory there is.
    """
    needed, free = batch_bytes(flow, 1), free_memory(flow.var.device)
    if needed is None or free is None:
        raise InputValueError(
            "batch_size='auto': this flow, or this system, does not say how much memory; give a number"
        )
    num = int(_SHARE * free) // needed
    if num < 1:
        raise InputValueError(
            f"a sample needs {needed / 2**30:.1f} GiB beside the weights, and {free / 2**30:.1f} GiB are free"
        )
    return most if num >= most else 1 << (num.bit_length() - 1)
