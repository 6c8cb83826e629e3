"""Exact solutions of a flow's blocks, from which a calibration starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.blocks.context import Context
from jacobiflow.errors import InputValueError
from jacobiflow.fixed_point import Sequential, Solver, solve
from jacobiflow.models.flow import Flow
from jacobiflow.utils.progress import Progress


class BlockSolution(NamedTuple):
    """Solutions X* of one block at z, in its causal order, and their context."""

    x: Float[Tensor, "b t c"]
    z: Float[Tensor, "b t c"]
    context: Context

    def split(self, size: int) -> Iterator[BlockSolution]:
        """Splits the solutions into batches of `size` samples."""
        for start in range(0, len(self.x), size):
            rows = slice(start, start + size)
            yield BlockSolution(self.x[rows], self.z[rows], self.context[rows])


def exact_solutions(
    flow: Flow, latents: Float[Tensor, "n t c"], context: Context, batch_size: int, progress: Progress | None
) -> list[BlockSolution]:
    """Solves each block by the exact loop at standard normal latents. Raises ValueError if one overflows."""
    solutions = list[BlockSolution]()

    def solve_block(i: int, z: Tensor) -> Tensor:
        x = solve(flow.inverse_block(i), z, Solver(Sequential()), context, batch_size=batch_size).x
        overflows = int((~torch.isfinite(x).all(dim=(1, 2))).sum())
        if overflows:
            raise InputValueError(
                f"{overflows} of {len(x)} fresh latents overflow in the exact inverse of block {i}; lower the "
                "guidance, or use a wider dtype"
            )
        solutions.append(BlockSolution(x, z, context))
        return x

    flow.map_blocks_reversed(flow.prior_tokens(latents), solve_block, progress, "exact loop")
    return solutions[::-1]
