"""The memory of a process and of a batch, and the largest batch that fits."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil
import torch

from jacobiflow.blocks.base import FlowBlock
from jacobiflow.blocks.guidance import guided
from jacobiflow.errors import InputValueError
from jacobiflow.models.flow import Flow, check_flow
from jacobiflow.models.offload import without_values
from jacobiflow.utils.checks import check_count

_CGROUP_ROOT, _CGROUP_OF_PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_USABLE_FRACTION = 0.8  # The part of the free memory that a batch may take; the rest allows for fragmentation.
_TOKEN_ARRAYS = 12  # The arrays of tokens that a solve holds at a time.


def keep_freed_memory() -> None:
    """Lets this process keep the memory that it frees, which can save a quarter of its time on a CPU.

    By default glibc returns freed megabytes to the system. The next layer gets them anew, and the system clears them
    first. The command line calls this function. The library does not, since it affects the whole process.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_MMAP_THRESHOLD, 2**25)


def free_memory(device: torch.device) -> int:
    """Returns the bytes that this process can still take on a GPU, or on this machine and in its container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([psutil.virtual_memory().available, *_free_in_cgroups()])


def _free_in_cgroups() -> Iterator[int]:
    """Yields the bytes left in each control group (version 2) that limits this process: a container, a job."""
    try:
        group = _CGROUP_ROOT / _CGROUP_OF_PROCESS.read_text().rpartition("0::/")[2].strip()
    except OSError:
        return
    for folder in (group, *group.parents):
        with suppress(OSError, ValueError):  # A group without a limit has the text "max".
            limit, used = (int((folder / file).read_text()) for file in ("memory.max", "memory.current"))
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            # The system drops cached files when a process needs their memory.
            yield limit - used + int(counts["active_file"]) + int(counts["inactive_file"])


def batch_bytes(flow: Flow, num: int) -> int | None:
    """Estimates the most bytes that `num` samples take beside the weights; `None` if a block's size is not known.

    The estimate counts keys and values, the activations of a sweep of all tokens, both twice under guidance, and the
    tokens. On a CPU it adds the copy of a block's weights that the exact loop makes. Blocks are solved one after the
    other, so the largest block counts.
    """
    sample = _sample_bytes(flow)
    return None if sample is None else check_count("num", num) * sample + _weight_copy_bytes(flow)


def exceeds_memory(flow: Flow, num: int) -> bool:
    """Tells if `num` samples need more than four fifths of the free memory; False if their size is not known."""
    needed = batch_bytes(flow, num)
    return needed is not None and needed > _USABLE_FRACTION * free_memory(flow.var.device)


def find_batch_size(flow: Flow, limit: int) -> int:
    """Returns the largest power of two of samples that fits in four fifths of the free memory, `limit` at most.

    Raises ValueError if not even one sample fits, or if its size is not known.
    """
    sample, free = _sample_bytes(flow), free_memory(flow.var.device)
    if sample is None:
        message = "this flow does not say how much memory it takes; give a number"
        raise InputValueError(message, argument="batch_size", value="auto")
    copied = _weight_copy_bytes(flow)
    num = _samples_that_fit(free, copied, sample)
    if num < 1:
        needed = (sample + copied) / 2**30
        raise InputValueError(
            f"a sample needs {needed:.1f} GiB beside the weights, and {free / 2**30:.1f} GiB are free"
        )
    return limit if num >= limit else _power_of_two(num)


def _samples_that_fit(free: int, needed: int, sample: int) -> int:
    """Returns the number of samples that fit in four fifths of the free bytes, beside `needed` bytes."""
    return max((int(_USABLE_FRACTION * free) - needed) // sample, 0)


def _power_of_two(num: int) -> int:
    """Returns the largest power of two up to `num`, or 0."""
    return 1 << num.bit_length() >> 1


@dataclass(frozen=True)
class MemoryNeeds:
    """The bytes that a flow takes in one dtype, and the batches that fit in the free memory of a device.

    Attributes:
        weights: The weights of all blocks.
        largest_block: The weights of the largest block.
        copied: The largest copy of a block's weights that the exact loop makes, on a CPU.
        keys_values: The cache of keys and values of a sample in the block with the largest one.
        sample: All that a sample takes beside the weights: the cache, the activations of a sweep, and the tokens.
        batch: The largest power of two of samples that fits with all weights; 0 if none does.
        offloaded_batch: The same with one block at a time on the device; two on a GPU, which copies the next one.
    """

    weights: int
    largest_block: int
    copied: int
    keys_values: int
    sample: int | None
    batch: int | None
    offloaded_batch: int | None


def memory_needs(flow: Flow, device: torch.device, dtype: torch.dtype) -> MemoryNeeds:
    """Computes from shapes what a flow needs to be sampled on a device, by solves of one block after the other.

    The flow's weights may be on any device, also the meta device. Guidance is that of the flow.
    """
    check_flow(flow)
    blocks, is_cpu = without_values(flow, dtype), device.type == "cpu"
    sizes = [sum(tensor.nbytes for tensor in block.state_dict().values()) for block in blocks]
    copied = [block.copy_bytes() if is_cpu else 0 for block in blocks]
    pairs = [first + second for first, second in pairwise(sizes)] or sizes  # A GPU copies the next block in advance.
    by_blocks = max(map(sum, zip(sizes, copied, strict=True))) if is_cpu else max(pairs)
    sample, free = _largest_sample(flow, blocks, dtype), free_memory(device)
    batches = [
        None if sample is None else _power_of_two(_samples_that_fit(free, needed, sample))
        for needed in (sum(sizes) + max(copied), by_blocks)
    ]
    keys_values = max(block.cache_bytes() * _rows_per_sample(flow, block) for block in blocks)
    return MemoryNeeds(sum(sizes), max(sizes), max(copied), keys_values, sample, *batches)


def _sample_bytes(flow: Flow) -> int | None:
    """Returns the bytes of each sample."""
    check_flow(flow)
    return _largest_sample(flow, _blocks(flow), flow.var.dtype)


def _largest_sample(flow: Flow, blocks: Iterable[FlowBlock], dtype: torch.dtype) -> int | None:
    largest = 0
    for block in blocks:
        row = block.row_bytes()
        if row is None:
            return None
        largest = max(largest, row * _rows_per_sample(flow, block))
    return largest + _TOKEN_ARRAYS * flow.config.num_tokens * flow.config.token_channels * max(dtype.itemsize, 4)


def _rows_per_sample(flow: Flow, block: FlowBlock) -> int:
    """Returns 2 for a block that guidance applies to, else 1."""
    return 1 if guided(block, flow.guidance) is block else 2


def _weight_copy_bytes(flow: Flow) -> int:
    """Returns the bytes of the largest copy of a block's weights."""
    return max(block.copy_bytes() for block in _blocks(flow)) if flow.var.device.type == "cpu" else 0


def _blocks(flow: Flow) -> Iterable[FlowBlock]:
    """Returns the blocks of a flow, in the dtype in which they compute."""
    return flow.blocks if flow.block_loader is None else flow.block_loader.shapes()
