"""The rounding of a flow's network, below which no tolerance can be reached."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.flows.image_flow import ImageFlow, precision
from jacobiflow.inversion import invert, prior_tokens
from jacobiflow.latents import FIRST_CALIBRATION_LATENT, draw_latents
from jacobiflow.solvers import Sequential, Solver, Tolerance, Whole, certify, solve
from jacobiflow.strategy.tune import all_classes

_MARGIN = 2.0  # the rounding of a few samples is taken to be within this factor of a batch's
_SAMPLES = 4  # that of one may be a quarter of another's, or none


def above_rounding(flow: ImageFlow, tolerance: float) -> float:
    """The tolerance, or twice the rounding of the network if that is larger.

    Only networks in bfloat16 or float16, under autocast or with TF32 products round coarsely; others are not measured.
    """
    low = flow.var.dtype.itemsize < 4 or precision(flow) == "tf32"
    if not (low or torch.is_autocast_enabled(flow.var.device.type)):
        return tolerance
    config = flow.config
    latents = draw_latents(_SAMPLES, config.num_tokens, config.token_channels, start=FIRST_CALIBRATION_LATENT)
    return max(tolerance, _MARGIN * rounding_floor(flow, latents))


def rounding_floor(flow: ImageFlow, latents: Float[Tensor, "b t c"]) -> float:
    """Measures the rounding of samples, however they are solved.

    The larger of the largest residual |g(x) - x| of the exact loop's answers, over the blocks, and the largest
    difference between its images and those of sweeps that stop at this residual. Samples that overflow do not count.
    """
    num, largest = len(latents), 0.0
    labels, blocks = all_classes(flow, num), flow.inverse_blocks

    def solve_block(i: int, z: Tensor) -> Tensor:
        nonlocal largest
        block, z = blocks[i], z.nan_to_num(0.0, 0.0, 0.0)
        exact = solve(block, z[:num], Solver(Sequential()), labels).x
        residual = certify(block, z[:num], exact, labels)
        largest = max([largest, *residual[residual.isfinite()].tolist()])
        iterated = solve(block, z[num:], Solver(Whole(), stopping=Tolerance(largest)), labels).x
        return torch.cat((exact, iterated))

    exact, iterated = invert(flow, prior_tokens(flow, latents).repeat(2, 1, 1), solve_block).chunk(2)
    return max(largest, float((exact - iterated).nan_to_num(0.0, 0.0, 0.0).abs().max()))
