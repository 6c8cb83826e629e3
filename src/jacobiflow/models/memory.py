"""The memory of a process and of a batch, and the largest batch that fits."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil
import torch

from jacobiflow.blocks.guidance import guided
from jacobiflow.errors import InputValueError
from jacobiflow.models.flow import Flow, check_flow
from jacobiflow.models.offload import without_values

_CGROUP_ROOT, _CGROUP_OF_PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_USABLE_FRACTION = 0.8  # The part of the free memory that a batch may take; the rest allows for fragmentation.
_TOKEN_ARRAYS = 12  # The arrays of tokens that a solve holds at a time, and that the gradient of a block keeps.
# The arrays of the size of keys that the gradient of a layer keeps: for that of its input, and for that of its weights.
_ARRAYS_OF_GRADIENT, _ARRAYS_OF_WEIGHTS = 11, 8


def keep_freed_memory() -> None:
    """Lets this process keep the memory that it frees.

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


@dataclass(frozen=True)
class MemoryNeeds:
    """The bytes that a flow takes in one dtype on one device, if its blocks are solved one after the other.

    Attributes:
        weights: The weights of all blocks.
        largest_block: The weights of the largest block.
        copied: The largest copy of a block's weights that the exact loop makes, on a CPU.
        offloaded: The weights and their copy that are on the device at a time if the flow is offloaded: one block, or
            two on a GPU, which copies the next one in advance.
        keys_values: The cache of keys and values of a sample in the block with the largest one.
        sample: All that a sample takes beside the weights: the cache, the activations of a sweep, and the tokens.
            `None` if a block's size is not known.
        gradient: The most that the gradient of a sample's log-density in float32 takes beside the weights; `None` if a
            block's size is not known.
    """

    weights: int
    largest_block: int
    copied: int
    offloaded: int
    keys_values: int
    sample: int | None
    gradient: int | None

    def of_batch(self, num: int) -> int | None:
        """Returns the most bytes that `num` samples take beside the weights; `None` if a block's size is not known."""
        return None if self.sample is None else num * self.sample + self.copied

    def max_batch(self, free: int, weights: int, limit: int | None = None) -> int | None:
        """Returns the largest power of two of samples that fits in four fifths of the `free` bytes beside `weights`.

        If as many as `limit` fit, it is `limit`. It is 0 if none fits, and `None` if a block's size is not known.
        """
        if self.sample is None:
            return None
        num = max((int(_USABLE_FRACTION * free) - weights) // self.sample, 0)
        return limit if limit is not None and num >= limit else 1 << num.bit_length() >> 1


def memory_needs(flow: Flow, device: torch.device | None = None, dtype: torch.dtype | None = None) -> MemoryNeeds:
    """Computes from shapes what a flow needs to be sampled under its guidance.

    The flow's weights may be on any device, also the meta device.

    Args:
        device: The device that samples; by default the flow's.
        dtype: The dtype of the weights there; by default the flow's.
    """
    check_flow(flow)
    device, dtype = device or flow.var.device, dtype or flow.var.dtype
    is_cpu, as_it_is = device.type == "cpu", flow.block_loader is None and dtype == flow.var.dtype
    blocks = flow.blocks if as_it_is else without_values(flow, dtype)
    sizes = [sum(tensor.nbytes for tensor in block.state_dict().values()) for block in blocks]
    copied = [block.copy_bytes() if is_cpu else 0 for block in blocks]
    loaded = list(map(sum, zip(sizes, copied, strict=True) if is_cpu else pairwise(sizes))) or sizes
    num_rows = [1 if guided(block, flow.guidance) is block else 2 for block in blocks]
    caches = [num * block.cache_bytes() for num, block in zip(num_rows, blocks, strict=True)]
    rows = [block.row_bytes() for block in blocks]
    samples = [num * row for num, row in zip(num_rows, rows, strict=True) if row is not None]
    tokens = _TOKEN_ARRAYS * flow.config.num_tokens * flow.config.token_dim * max(dtype.itemsize, 4)
    arrays = _ARRAYS_OF_GRADIENT + _ARRAYS_OF_WEIGHTS * any(weight.requires_grad for weight in flow.parameters())
    activations = [arrays * block.cache_bytes() // 2 for block in blocks]
    gradient = (sum if flow.block_loader is None else max)(activations) + len(blocks) * tokens
    sample = None if None in rows else max(samples) + tokens
    return MemoryNeeds(
        sum(sizes), max(sizes), max(copied), max(loaded), max(caches), sample,
        None if sample is None else gradient + sample,
    )  # fmt: skip


def exceeds_memory(flow: Flow, num: int) -> bool:
    """Tells if `num` samples need more than four fifths of the free memory; False if their size is not known."""
    needed = memory_needs(flow).of_batch(num)
    return needed is not None and needed > _USABLE_FRACTION * free_memory(flow.var.device)


def find_batch_size(flow: Flow, limit: int) -> int:
    """Returns the largest power of two of samples that fits in four fifths of the free memory, `limit` at most.

    Raises ValueError if not even one sample fits, or if its size is not known.
    """
    needs, free = memory_needs(flow), free_memory(flow.var.device)
    batch, needed = needs.max_batch(free, needs.copied, limit), needs.of_batch(1)
    if batch is None or needed is None:
        message = "this flow does not say how much memory it takes; give a number"
        raise InputValueError(message, argument="batch_size", value="auto")
    if batch < 1:
        raise InputValueError(
            f"a sample needs {needed / 2**30:.1f} GiB beside the weights, and {free / 2**30:.1f} GiB are free"
        )
    return batch
