"""The memory of a process, of a batch, and the largest batch that fits."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from jacobiflow.errors import InputValueError
from jacobiflow.models.flow import Flow, check_flow
from jacobiflow.utils.checks import check_count

_GROUPS, _OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # of Linux
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


def free_memory(device: torch.device) -> int:
    """Returns the bytes that this process can still take on the device, or on this machine and in its container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([psutil.virtual_memory().available, *_free_in_groups()])


def _free_in_groups() -> Iterator[int]:
    """The bytes left in each control group (version 2) that limits this process: a container, a job."""
    try:
        group = _GROUPS / _OWN_GROUP.read_text().rpartition("0::/")[2].strip()
    except OSError:
        return
    for folder in (group, *group.parents):
        with suppress(OSError, ValueError):  # a group without a limit says "max"
            limit, used = (int((folder / file).read_text()) for file in ("memory.max", "memory.current"))
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield limit - used + int(counts["active_file"]) + int(counts["inactive_file"])  # cached files make room


def batch_bytes(flow: Flow, num: int) -> int | None:
    """Estimates the bytes that `num` samples take at most beside the weights; `None` if the flow does not say.

    By the shapes: keys and values, twice under guidance, what a sweep of all tokens makes, the tokens, and the copy of
    a block's weights that its exact loop makes on a CPU. Blocks are solved one after the other, so the largest counts.
    """
    sample = _sample_bytes(flow)
    return None if sample is None else check_count("num", num) * sample + _copy_bytes(flow)


def _sample_bytes(flow: Flow) -> int | None:
    """The bytes of each sample."""
    check_flow(flow)
    largest, config = 0, flow.config
    for block, inverse in zip(flow.blocks, flow.inverse_blocks, strict=True):
        row = block.row_bytes()
        if row is None:
            return None
        largest = max(largest, row if inverse is block else 2 * row)
    return largest + _STATES * config.num_tokens * config.token_channels * max(flow.var.element_size(), 4)


def _copy_bytes(flow: Flow) -> int:
    """The bytes of the largest copy of a block's weights."""
    return max(block.copy_bytes() for block in flow.blocks) if flow.var.device.type == "cpu" else 0


def exceeds_memory(flow: Flow, num: int) -> bool:
    """Tells if `num` samples need more than four fifths of the free memory; False if the flow does not say."""
    needed = batch_bytes(flow, num)
    return needed is not None and needed > _SHARE * free_memory(flow.var.device)


def fitting_batch(flow: Flow, most: int) -> int:
    """Finds the largest power of two, or else `most`, of samples that fit in four fifths of the free memory.

    Raises ValueError if not even one does, or if the flow does not say how much memory a sample takes.
    """
    sample, free = _sample_bytes(flow), free_memory(flow.var.device)
    if sample is None:
        raise InputValueError("batch_size='auto': this flow does not say how much memory it takes; give a number")
    copied = _copy_bytes(flow)
    num = (int(_SHARE * free) - copied) // sample
    if num < 1:
        needed = (sample + copied) / 2**30
        raise InputValueError(
            f"a sample needs {needed:.1f} GiB beside the weights, and {free / 2**30:.1f} GiB are free"
        )
    return most if num >= most else 1 << (num.bit_length() - 1)
