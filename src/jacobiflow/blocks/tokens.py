"""Runs of tokens, each starting at a position of its own in each sample."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

Tokens = Float[Tensor, "b t c"]
"""Tokens of a batch: T for each of B samples, of C values."""


def row_batches(num: int, size: int | None) -> list[slice]:
    """Returns the rows of batches of at most `size` of `num` samples; all at once for `None`."""
    size = size or max(num, 1)
    return [slice(start, min(start + size, num)) for start in range(0, num, size)]


def gather_run(x: Tokens, start: int | Int[Tensor, " b"], size: int) -> Float[Tensor, "b n c"]:
    """Returns x[b, start_b : start_b + size] for every sample b; a view if all samples share `start`."""
    if isinstance(start, int):
        return x[:, start : start + size]
    return x.gather(1, _positions(start, size, x.shape[2]))


def scatter_run(x: Tokens, run: Float[Tensor, "b n c"], start: int | Int[Tensor, " b"]) -> None:
    """Writes the entries that `gather_run` reads, in place."""
    if isinstance(start, int):
        x[:, start : start + run.shape[1]] = run
    else:
        x.scatter_(1, _positions(start, run.shape[1], x.shape[2]), run)


def _positions(start: Int[Tensor, " b"], size: int, token_dim: int) -> Int[Tensor, "b n c"]:
    positions = start.view(-1, 1) + torch.arange(size, device=start.device)
    return positions.unsqueeze(-1).expand(-1, -1, token_dim)
