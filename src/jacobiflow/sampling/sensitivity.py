"""The change of each sample by the rounding of the network's dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jacobiflow.blocks.guidance import guided
from jacobiflow.blocks.tokens import Tokens
from jacobiflow.fixed_point import Sequential, Solver
from jacobiflow.fixed_point.options import SolveOptions
from jacobiflow.fixed_point.problem import Problem
from jacobiflow.fixed_point.solve import solve_problem
from jacobiflow.models.flow import Flow
from jacobiflow.models.latents import FIRST_CALIBRATION_LATENT, draw_latents
from jacobiflow.planner import Strategy
from jacobiflow.sampling.invert import FlowSolution, invert_in_groups
from jacobiflow.sampling.result import SENSITIVITY_BOUND

FLOAT64_BOUND = SENSITIVITY_BOUND / 40
"""The estimated change above which an exact sample is solved in float64."""


def measure_sensitivity(
    flow: Flow, strategy: Strategy, solution: FlowSolution, options: SolveOptions,
    on_block: Callable[[], None] | None = None,
) -> Float[Tensor, " n"]:  # fmt: skip
    """Returns the largest change of an entry of each sample by rounding, in the units of x.

    It is estimated by a second solve, from latents after one more rounding. Exact samples that it moves by more than
    `FLOAT64_BOUND` are solved in float64. The sensitivity is infinite if a sample is not finite in one of the solves.
    """
    latents = _round_once(flow, solution.latents)
    (other,) = invert_in_groups(flow, strategy, latents, solution.context, options, on_block=on_block)
    change = _largest_change(flow, other.x, solution.x)
    rows = (change > FLOAT64_BOUND) & solution.is_exact() & ~solution.nonfinite
    if rows.any() and flow.state_dtype != torch.float64:
        change[rows] = _largest_change(flow, _solve_in_float64(flow, solution, rows, options), solution.x[rows])
    return change


def _round_once(flow: Flow, latents: Tokens) -> Tokens:
    """The latents after one rounding of the flow's dtype, up or down by the same pattern in each sample."""
    eps = 2**-10 if flow.precision == "tf32" else torch.finfo(flow.var.dtype).eps
    _, num_tokens, token_dim = latents.shape
    signs = draw_latents(1, num_tokens, token_dim, start=FIRST_CALIBRATION_LATENT).sign().to(latents)
    return latents + eps * signs * latents.abs().clamp(min=1)  # latents near 0 are changed, too


def _largest_change(flow: Flow, tokens: Tokens, x: Tokens) -> Float[Tensor, " n"]:
    change = flow.from_tokens(tokens) - flow.from_tokens(x)
    return change.abs().flatten(1).amax(dim=1).nan_to_num(nan=torch.inf, posinf=torch.inf).to(x.dtype)


def _solve_in_float64(
    flow: Flow, solution: FlowSolution, rows: Bool[Tensor, " n"], options: SolveOptions
) -> Float[Tensor, "m t d"]:
    """The tokens of some samples in float64, with a copy of one block at a time."""
    exact = SolveOptions(certify=False, batch_size=options.batch_size)

    def solve_block(i: int, z: Tensor) -> Tensor:
        block = guided(copy.deepcopy(flow.block(i)).double(), flow.guidance)
        return solve_problem(Problem(block, z, solution.context[rows]), Solver(Sequential()), exact).x

    return flow.map_blocks_reversed(solution.latents[rows].double() * flow.var.double().sqrt(), solve_block)
