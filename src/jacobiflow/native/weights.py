"""The dtypes in which native code reads the matrices of a recurrence: their own, or 16 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from jacobiflow.native.boundary import MATRICES

HALVES = (torch.float16, torch.bfloat16)
MIN_IN_PLACE = 2**25  # fewest weights of a block that are read as PyTorch has them, since no cache holds them
_MIN_BF16 = 2**20  # fewest weights of a block for which bfloat16 is faster than float32, with few rows
_MAX_BF16_ROWS = 8  # most rows of the network per team that are few
_MIN_BF16_ANY_ROWS = 2**23  # fewest weights of a block for which bfloat16 is faster with any number of rows
_MAX_INT16 = 2**15 - 1


def faster_halves(num_weights: int, rows: int) -> Sequence[torch.dtype]:
    """Returns the dtypes that are read faster than float32, by a block's weights and the network's rows per team."""
    is_bf16_faster = num_weights >= _MIN_BF16_ANY_ROWS or (num_weights >= _MIN_BF16 and rows <= _MAX_BF16_ROWS)
    return HALVES if is_bf16_faster else HALVES[:1]


def in_halves(matrices: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor] | None:
    """Returns float32 matrices in the first of these dtypes that has all their entries; `None` if none has."""
    few = matrices[0][:1]
    for dtype in dtypes:
        if _is_exact(few.to(dtype), few):
            halves = [matrix.to(dtype) for matrix in matrices]
            if all(map(_is_exact, halves, matrices)):
                return halves
    return None


def _is_exact(half: Tensor, matrix: Tensor) -> bool:
    return torch.equal(half.float(), matrix)


def in_int16(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a finite matrix rounded to 16-bit integers, and the scale of each row."""
    scales = (matrix.abs().amax(dim=1) / _MAX_INT16).clamp(min=torch.finfo(matrix.dtype).tiny)
    return (matrix / scales.unsqueeze(1)).round_().to(torch.int16), scales


def copy_bytes(layers: Sequence[Mapping[str, Tensor]]) -> int:
    """Returns the bytes that a recurrence takes at most for copies of its layers' matrices.

    Large ones are read in place, but float32 may be copied to 16 bits.
    """
    matrices = [layer[name] for layer in layers for name in layer.keys() & MATRICES]
    is_read_in_place = sum(map(torch.numel, matrices)) >= MIN_IN_PLACE and matrices[0].dtype != torch.float32
    return 0 if is_read_in_place else sum(matrix.nbytes for matrix in matrices)
