"""The inverse of a flow: every block solved by its solver, last first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jacobiflow.blocks.context import Context
from jacobiflow.blocks.tokens import Tokens
from jacobiflow.fixed_point.implicit import with_gradient
from jacobiflow.fixed_point.options import SolveOptions
from jacobiflow.fixed_point.problem import Problem
from jacobiflow.fixed_point.solution import Solution, Status
from jacobiflow.fixed_point.solve import solve_problem
from jacobiflow.models.flow import Flow
from jacobiflow.models.latents import log_normal
from jacobiflow.planner import Strategy

_BATCHES_PER_GROUP = 16
"""Batches that go through a block before the next block: a step of the progress bar, and a bound of the memory."""


@dataclass(frozen=True)
class FlowSolution:
    """The solved tokens of a flow.

    Attributes:
        latents: Standard normal.
        context: Context of the samples.
        x: Tokens in the order of the data; NaN for samples that are not finite.
        log_det: log|det dx/dz| of all blocks in nats, at this x; NaN if it is not known.
        nonfinite: Samples whose exact inverse overflows.
        solutions: The solutions of the blocks, in encoding order.
        intermediates: The tokens before the first block in sampling order, and after each; empty if not asked for.
    """

    latents: Tokens
    context: Context
    x: Tokens
    log_det: Float[Tensor, " n"]
    nonfinite: Bool[Tensor, " n"]
    solutions: tuple[Solution, ...]
    intermediates: tuple[Tokens, ...]

    def is_exact(self) -> Bool[Tensor, " n"]:
        """Returns which samples were solved token by token in every block."""
        return torch.stack([solution.exact for solution in self.solutions]).all(dim=0)


def num_groups(num: int, batch_size: int) -> int:
    """Returns the number of groups of `invert_in_groups`."""
    return -(-num // (_BATCHES_PER_GROUP * batch_size))


def invert_in_groups(
    flow: Flow, strategy: Strategy, latents: Tokens, context: Context, options: SolveOptions, *,
    on_block: Callable[[], None] | None = None, with_intermediates: bool = False,
) -> Iterator[FlowSolution]:  # fmt: skip
    """Yields the solutions of groups of samples: each group goes through all blocks, last first, before the next.

    The solutions have gradients if they are enabled. `on_block` is called after each block.
    """
    size = _BATCHES_PER_GROUP * (options.batch_size or len(latents))
    for start in range(0, len(latents), size):
        group = slice(start, start + size)
        z, rows = latents[group], context[group]
        x = flow.prior_tokens(z)
        nonfinite, log_det = ~torch.isfinite(x).all(dim=(1, 2)), x.new_zeros(len(x))
        solutions, intermediates = list[Solution](), [x]
        for i in reversed(range(flow.config.num_blocks)):
            permutation = flow.blocks[i].permutation
            # A sample that overflowed is replaced by zeros, so that the rest of its group can be solved.
            z_block = permutation(x).masked_fill(nonfinite.view(-1, 1, 1), 0)
            solution = solve_problem(Problem(flow.inverse_block(i), z_block, rows), strategy.solvers[i], options)
            tokens, block_log_det = solution.x, solution.log_det
            if torch.is_grad_enabled():
                tokens, block_log_det = _attach_gradient(flow, i, z_block, rows, solution)
            log_det = log_det + block_log_det
            nonfinite = nonfinite | (solution.status == Status.NONFINITE)
            x = permutation.inverse(tokens.masked_fill(nonfinite.view(-1, 1, 1), torch.nan))
            solutions.append(
                replace(
                    solution,
                    status=solution.status.masked_fill(nonfinite, Status.NONFINITE),
                    residual=solution.residual.masked_fill(nonfinite, torch.inf),
                )
            )
            intermediates.append(x)
            if not with_intermediates:
                intermediates.clear()
            if on_block is not None:
                on_block()
        yield FlowSolution(z, rows, x, log_det, nonfinite, tuple(reversed(solutions)), tuple(intermediates))


def _attach_gradient(flow: Flow, i: int, z: Tokens, context: Context, solution: Solution) -> tuple[Tensor, Tensor]:
    """Returns x and the log-determinant of a block, with gradients if the block, `z` or the context has any."""
    shared = [each for name, each in flow.named_parameters() if not name.startswith("blocks.")]  # A Prose has some.
    parameters: list[Tensor] = [each for each in (*flow.block(i).parameters(), *shared) if each.requires_grad]
    inputs = (z, context.values)
    if not parameters and not any(each is not None and each.requires_grad for each in inputs):
        return solution.x, solution.log_det
    # NaN in one row would spoil the gradients of the weights, which add up those of all rows.
    x = solution.x.masked_fill((solution.status == Status.NONFINITE).view(-1, 1, 1), 0)
    return with_gradient(Problem(flow.inverse_block(i), z, context), parameters, x, solution.log_det)


def log_prob_of(flow: Flow, solution: FlowSolution, batch_size: int) -> Float[Tensor, " n"]:
    """Returns the log-densities of the samples in nats, at their x.

    If all blocks are exact, x encodes to the latents through the tokens that were solved, so that the sums of
    log-scales are known. Else a block that was solved to a tolerance moves the tokens that the blocks after it would
    read in encoding: these samples are encoded.
    """
    x, nonfinite, var = solution.x, solution.nonfinite, flow.var.to(solution.x.dtype)
    log_prob = log_normal(solution.latents) - solution.log_det - 0.5 * var.log().sum() + flow.tokens_log_det(x)
    is_unknown = (~solution.is_exact() | solution.log_det.isnan()) & ~nonfinite
    rows = is_unknown.nonzero().flatten()
    for batch in rows.split(batch_size) if len(rows) else ():
        z, log_det = flow.encode_tokens(x[batch], solution.context[batch])
        log_prob = log_prob.index_put((batch,), log_normal(z) + log_det)
    return log_prob.masked_fill(nonfinite, torch.nan)
