"""The dtypes in which native code reads the matrices of a recurrence: their own, or 16 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from jacobiflow.native.boundary import MATRICES

HALVES = (torch.float16, torch.bfloat16)
MIN_IN_PLACE = 2**25  # weights of a block: from here on they come from memory, and are read as PyTorch has them
_MIN_BF16, _BF16_ROWS = 2**20, 8  # weights of a block, and rows per team, for which bfloat16 is faster than float32 ...
_ALWAYS_BF16 = 2**23  # ... which it is for any rows if no cache of a processor core holds the weights
_MAX_INT16 = 2**15 - 1


def in_halves(matrices: Sequence[Tensor], rows: int) -> list[Tensor] | None:
    """Returns float32 matrices in a 16-bit floating-point dtype that has all their entries.

    It is `None` if there is no such dtype, or if reading it is no faster for so many rows of the network per team.
    """
    count, few = sum(map(torch.numel, matrices)), matrices[0][:1]
    bf16_pays = count >= _ALWAYS_BF16 or (count >= _MIN_BF16 and rows <= _BF16_ROWS)
    for dtype in HALVES if bf16_pays else HALVES[:1]:
        if _is_exact(few.to(dtype), few):
            halves = [matrix.to(dtype) for matrix in matrices]
            if all(map(_is_exact, halves, matrices)):
                return halves
    return None


def _is_exact(half: Tensor, matrix: Tensor) -> bool:
    return torch.equal(half.float(), matrix)


def in_int16(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the entries of a finite matrix as 16-bit integers, and what each row of them is to be multiplied by."""
    scales = (matrix.abs().amax(dim=1) / _MAX_INT16).clamp(min=torch.finfo(matrix.dtype).tiny)
    return (matrix / scales.unsqueeze(1)).round_().to(torch.int16), scales


def copy_bytes(layers: Sequence[Mapping[str, Tensor]]) -> int:
    """Returns the bytes that a recurrence takes at most for weights beside those that are there.

    Large ones are read in place, but float32 may be copied to 16 bits.
    """
    matrices = [layer[name] for layer in layers for name in layer.keys() & MATRICES]
    is_read_in_place = sum(map(torch.numel, matrices)) >= MIN_IN_PLACE and matrices[0].dtype != torch.float32
    return 0 if is_read_in_place else sum(matrix.nbytes for matrix in matrices)
