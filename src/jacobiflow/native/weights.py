"""The weights of a transformer as native code reads them: in their own dtype, or in 16 bits."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, compress

import torch
from torch import Tensor

from jacobiflow.errors import UnsupportedError
from jacobiflow.native.boundary import Weight, WeightCopy
from jacobiflow.native.library import Library
from jacobiflow.native.tensors import MATRICES, WEIGHT_FORMATS, addresses_of, allocate

MIN_IN_PLACE = 2**25  # weights of a block from which they are read as PyTorch has them, since no cache holds them
_MIN_BF16 = 2**20  # weights of a block from which they are read in bfloat16 with few rows
_MAX_BF16_ROWS = 8  # largest number of the network's rows per team that counts as few
_MIN_BF16_ANY_ROWS = 2**23  # weights of a block from which they are read in bfloat16 with any number of rows
_ALIGNMENT = 64  # Matrices begin at multiples of so many numbers.
_MAX_KEPT_BYTES = 2**27  # Larger memory is freed after the call.

_kept = threading.local()


class WeightMemory:
    """Memory for copies of weights. It grows and is kept, since the system clears fresh memory."""

    def __init__(self) -> None:
        self.bytes = allocate(torch.uint8, 0)

    def resize(self, size: int) -> int:
        """Grows the memory to `size` bytes if it is smaller, and returns its address."""
        if len(self.bytes) < size:
            self.bytes = allocate(torch.uint8, size)
        return self.bytes.data_ptr()


@contextmanager
def kept_memory() -> Iterator[WeightMemory]:
    """Yields memory that this thread keeps from call to call, unless it becomes too large."""
    memory, _kept.memory = getattr(_kept, "memory", None) or WeightMemory(), None  # A nested call takes other memory.
    yield memory
    if len(memory.bytes) <= _MAX_KEPT_BYTES:
        _kept.memory = memory


def store_weights(
    native: Library, matrices: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], num_weights: int, rows: int,
    memory: WeightMemory,
) -> list[Weight]:  # fmt: skip
    """Copies matrices to panels, in a 16-bit dtype that represents all of them, else in their own.

    Large matrices of whole vectors keep their rows, and are not copied if they keep their dtype.

    Args:
        matrices: Contiguous, of the same dtype.
        num_weights: The weights of the block.
        rows: The rows of the network per team of threads.
    """
    dtype, in_place = matrices[0].dtype, num_weights >= MIN_IN_PLACE
    if dtype not in WEIGHT_FORMATS:
        raise UnsupportedError(f"weights of {dtype}")
    sums = torch.promote_types(dtype, torch.float32)
    addresses = addresses_of(matrices, [*shapes], dtype)
    keeps_rows = [in_place and all(native.padded(size, sums) == size for size in shape) for shape in shapes]
    use_bf16 = num_weights >= _MIN_BF16_ANY_ROWS or (num_weights >= _MIN_BF16 and rows <= _MAX_BF16_ROWS)
    halves = (torch.float16, torch.bfloat16) if use_bf16 else (torch.float16,)
    for stored in (*halves, dtype) if dtype == torch.float32 and native.has_fast_halves else (dtype,):
        is_copied = [not rows or stored != dtype for rows in keeps_rows]
        counts = [-(-native.padded(outputs, sums) * inputs // _ALIGNMENT) * _ALIGNMENT for outputs, inputs in shapes]
        sizes = [count * stored.itemsize * copied for count, copied in zip(counts, is_copied, strict=True)]
        places = accumulate(sizes[:-1], initial=memory.resize(sum(sizes)))
        weights = [
            Weight(place if copied else address, WEIGHT_FORMATS[stored], not rows)
            for place, address, copied, rows in zip(places, addresses, is_copied, keeps_rows, strict=True)
        ]
        copies = [
            WeightCopy(weight, address, *shape)
            for weight, address, shape in compress(zip(weights, addresses, shapes, strict=True), is_copied)
        ]
        if not copies or native.store((WeightCopy * len(copies))(*copies), WEIGHT_FORMATS[dtype]):
            return weights
    raise MemoryError("not enough memory for native code")


def copy_bytes(layers: Sequence[Mapping[str, Tensor]]) -> int:
    """Returns the largest number of bytes that native code takes for copies of the layers' matrices.

    It reads large matrices in place, but may copy float32 to 16 bits.
    """
    matrices = [layer[name] for layer in layers for name in layer.keys() & MATRICES]
    is_read_in_place = sum(map(torch.numel, matrices)) >= MIN_IN_PLACE and matrices[0].dtype != torch.float32
    return 0 if is_read_in_place else sum(matrix.nbytes for matrix in matrices)
