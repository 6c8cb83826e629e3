"""The dtypes in which native code reads the matrices of a transformer: their own, or 16 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from jacobiflow.native.boundary import UnsupportedError
from jacobiflow.native.tensors import MATRICES

MIN_IN_PLACE = 2**25  # weights of a block from which they are read as PyTorch has them, since no cache holds them
_HALVES = (torch.float16, torch.bfloat16)
_MIN_BF16 = 2**20  # weights of a block from which bfloat16 is faster than float32, with few rows
_MAX_BF16_ROWS = 8  # largest number of the network's rows per team that counts as few
_MIN_BF16_ANY_ROWS = 2**23  # weights of a block from which bfloat16 is faster with any number of rows
_MAX_INT16 = 2**15 - 1


def faster_halves(num_weights: int, rows: int) -> Sequence[torch.dtype]:
    """Returns the 16-bit dtypes that are read faster than float32, by a block's weights and the rows of a team."""
    is_bf16_faster = num_weights >= _MIN_BF16_ANY_ROWS or (num_weights >= _MIN_BF16 and rows <= _MAX_BF16_ROWS)
    return _HALVES if is_bf16_faster else _HALVES[:1]


def stored_matrices(
    matrices: list[Tensor], halves: Sequence[torch.dtype], is_rounded: bool
) -> tuple[list[Tensor], list[Tensor] | list[None]]:
    """Returns matrices in the dtype in which they are read, and their scales if they are rounded.

    Args:
        halves: The 16-bit dtypes to use for matrices that they can represent exactly.
    """
    if not is_rounded:
        return _in_halves(matrices, halves) or matrices, [None] * len(matrices)
    if matrices[0].dtype != torch.float32 or _in_halves(matrices, _HALVES) is not None:
        raise UnsupportedError("weights that have 16 bits already, or 64")
    if not all(bool(matrix.isfinite().all()) for matrix in matrices):
        raise UnsupportedError("weights that are not finite")
    integers, scales = zip(*map(_in_int16, matrices), strict=True)
    return list(integers), list(scales)


def _in_halves(matrices: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor] | None:
    """Returns float32 matrices in the first of these dtypes that represents them exactly, or `None`."""
    few = matrices[0][:1]
    for dtype in dtypes:
        if _is_exact(few.to(dtype), few):
            halves = [matrix.to(dtype) for matrix in matrices]
            if all(map(_is_exact, halves, matrices)):
                return halves
    return None


def _is_exact(half: Tensor, matrix: Tensor) -> bool:
    return torch.equal(half.float(), matrix)


def _in_int16(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds a finite matrix to 16-bit integers, and returns them with the scale of each row."""
    scales = (matrix.abs().amax(dim=1) / _MAX_INT16).clamp(min=torch.finfo(matrix.dtype).tiny)
    return (matrix / scales.unsqueeze(1)).round_().to(torch.int16), scales


def copy_bytes(layers: Sequence[Mapping[str, Tensor]]) -> int:
    """Returns the largest number of bytes that native code takes for copies of the layers' matrices.

    It reads large matrices in place, but may copy float32 to 16 bits.
    """
    matrices = [layer[name] for layer in layers for name in layer.keys() & MATRICES]
    is_read_in_place = sum(map(torch.numel, matrices)) >= MIN_IN_PLACE and matrices[0].dtype != torch.float32
    return 0 if is_read_in_place else sum(matrix.nbytes for matrix in matrices)
