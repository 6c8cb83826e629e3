"""The dtypes in which native code reads the matrices of a transformer: their own, or 16 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from jacobiflow.native.tensors import MATRICES

MIN_IN_PLACE = 2**25  # weights of a block from which they are read as PyTorch has them, since no cache holds them
_HALVES = (torch.float16, torch.bfloat16)
_MIN_BF16 = 2**20  # weights of a block from which bfloat16 is faster than float32, with few rows
_MAX_BF16_ROWS = 8  # largest number of the network's rows per team that counts as few
_MIN_BF16_ANY_ROWS = 2**23  # weights of a block from which bfloat16 is faster with any number of rows


def faster_halves(num_weights: int, rows: int) -> Sequence[torch.dtype]:
    """Returns the 16-bit dtypes that are read faster than float32, by a block's weights and the rows of a team."""
    is_bf16_faster = num_weights >= _MIN_BF16_ANY_ROWS or (num_weights >= _MIN_BF16 and rows <= _MAX_BF16_ROWS)
    return _HALVES if is_bf16_faster else _HALVES[:1]


def stored_matrices(matrices: list[Tensor], halves: Sequence[torch.dtype]) -> list[Tensor]:
    """Returns float32 matrices in the first of these dtypes that represents them all exactly, else as they are."""
    few = matrices[0][:1]
    for dtype in halves:
        if _is_exact(few.to(dtype), few):
            stored = [matrix.to(dtype) for matrix in matrices]
            if all(map(_is_exact, stored, matrices)):
                return stored
    return matrices


def _is_exact(half: Tensor, matrix: Tensor) -> bool:
    return torch.equal(half.float(), matrix)


def copy_bytes(layers: Sequence[Mapping[str, Tensor]]) -> int:
    """Returns the largest number of bytes that native code takes for copies of the layers' matrices.

    It reads large matrices in place, but may copy float32 to 16 bits.
    """
    matrices = [layer[name] for layer in layers for name in layer.keys() & MATRICES]
    is_read_in_place = sum(map(torch.numel, matrices)) >= MIN_IN_PLACE and matrices[0].dtype != torch.float32
    return 0 if is_read_in_place else sum(matrix.nbytes for matrix in matrices)
