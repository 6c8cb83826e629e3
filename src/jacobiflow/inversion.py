"""The inverse of a flow: the chain of blocks, walked backwards."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from jacobiflow.flows.image_flow import ImageFlow, state_dtype

Solve = Callable[[int, Tensor], Tensor]


def prior_tokens(flow: ImageFlow, latents: Float[Tensor, "n t c"]) -> Float[Tensor, "n t c"]:
    """Returns sqrt(var) times the standard normal `latents`, the input of the last block.

    They are on the flow's device, in the dtype of the state, see `state_dtype`.
    """
    dtype = state_dtype(flow)
    return latents.to(flow.var.device, dtype) * flow.var.to(dtype).sqrt()


def invert(flow: ImageFlow, x: Float[Tensor, "n t c"], solve: Solve) -> Float[Tensor, "n t c"]:
    """Returns the tokens x = f_0^-1(... f_{L-1}^-1(x)) in raster order, before `flow.to_images`.

    `solve(i, z)` inverts block `i` at `z`, both in the block's causal order. It may return more rows than `z` has.
    """
    for i in reversed(range(flow.config.num_blocks)):
        permutation = flow.blocks[i].permutation
        x = permutation(solve(i, permutation(x)))
    return x
