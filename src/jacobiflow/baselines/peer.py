"""What the samplers of other papers share: a counted map of each block, over the library's own caches.

Others' stopping rules run over the same blocks, caches and float32 state as the library's solvers, so that a comparison
is of the rules alone. They test a change over the whole batch and return what they have: no residual is measured,
nothing is solved again, and a value that overflows stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.checks import check_finite, check_floating, check_on
from jacobiflow.flows.base import AffineBlock
from jacobiflow.flows.image_flow import ImageFlow, check_flow
from jacobiflow.flows.labels import Labels
from jacobiflow.guidance import Guidance, check_guidance, guided
from jacobiflow.inversion import invert, prior_tokens


@dataclass(frozen=True)
class PeerSamples:
    """Images (N, C, H, W), not clipped, and their cost over all blocks.

    `network_calls` counts evaluations of a block, under guidance of two rows a sample; `token_evaluations` tokens times
    samples over these calls. Both are counted as in `jacobiflow.Samples`.
    """

    images: Float[Tensor, "n c h w"]
    network_calls: int
    token_evaluations: int


class CountedMap:
    """The map g of a block at `z` (N, T, C), in the block's causal order, and what its evaluations have cost."""

    def __init__(self, block: AffineBlock, z: Tensor, labels: Tensor | None) -> None:
        self.block, self.z = block, z
        self.cache = block.init_cache(z, labels)
        self.network_calls = self.token_evaluations = 0

    def __call__(self, x: Tensor, start: int, stop: int) -> Tensor:
        """g(x)[:, start:stop]; stores the keys of positions start-1 .. stop-2 as `x` has them."""
        self.network_calls += 1
        self.token_evaluations += len(x) * (stop - start)
        return self.block.update(x, self.z, start, stop, self.cache)


BlockSolver = Callable[[CountedMap], Tensor]
"""Gives the tokens (N, T, C) at which it ends, in the block's causal order."""


def sample_by(
    flow: ImageFlow, z: Float[Tensor, "n t c"], labels: Labels | None, guidance: Guidance | None,
    solvers: Sequence[BlockSolver],
) -> PeerSamples:  # fmt: skip
    """Images from standard normal latents `z`, with a solver per block, in encoding order.

    **Raises** as `check_arguments` does.
    """
    classes = check_arguments(flow, z, labels, guidance)
    calls = evaluations = 0

    def solve(i: int, z: Tensor) -> Tensor:
        nonlocal calls, evaluations
        g = CountedMap(guided(flow.blocks[i], guidance), z, classes)
        x = solvers[i](g)
        calls, evaluations = calls + g.network_calls, evaluations + g.token_evaluations
        return x

    with torch.inference_mode():
        images = flow.to_images(invert(flow, prior_tokens(flow, z), solve))
    return PeerSamples(images, calls, evaluations)


def check_arguments(
    flow: ImageFlow, z: Tensor, labels: Labels | None, guidance: Guidance | None
) -> Int[Tensor, " n"] | None:
    """`labels` as a tensor on the flow's device. **Raises** `ValueError` if `z` or `labels` do not fit the flow,
    `TypeError` for other kinds of arguments.
    """
    check_flow(flow)
    check_floating("z", z, ("N", flow.config.num_tokens, flow.config.token_channels))
    check_finite("z", z)
    check_guidance(guidance)
    if labels is None:
        return None
    if isinstance(labels, Tensor):
        check_on("labels", labels, flow.var.device)
    return flow.check_labels(labels, len(z)).to(flow.var.device)
