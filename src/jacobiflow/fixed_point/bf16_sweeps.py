"""A guess from sweeps by the network in bfloat16."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from jacobiflow.blocks.base import AttentionBlock
from jacobiflow.blocks.tokens import Tokens
from jacobiflow.errors import InputValueError
from jacobiflow.fixed_point.batching import sweep
from jacobiflow.fixed_point.guess import Guess, Latent, Start
from jacobiflow.fixed_point.options import SolveOptions
from jacobiflow.fixed_point.partition import Whole
from jacobiflow.fixed_point.problem import Problem
from jacobiflow.fixed_point.registry import register_piece
from jacobiflow.fixed_point.solver import Solver, Stopping
from jacobiflow.utils.checks import check_count, check_fields


@register_piece("bf16_sweeps")
@dataclass(frozen=True)
class Bf16Sweeps(Guess):
    """X^(0) is the result of `count` sweeps of all tokens by the network in bfloat16, from another guess.

    The tokens stay in their dtype. The block must be an `AttentionBlock`.

    Example:
        >>> jf.Solver(jf.Whole(), jf.Bf16Sweeps(3)).guess
        Bf16Sweeps(count=3, guess=Latent())
    """

    count: int
    guess: Guess = field(default_factory=Latent)

    def __post_init__(self) -> None:
        check_count("Bf16Sweeps: count", self.count)
        check_fields(self)

    def __call__(self, z: Tokens) -> Tokens:
        """Returns the guess before the sweeps, which `start` makes."""
        return self.guess(z)

    def start(self, problem: Problem, options: SolveOptions) -> Start:
        if not isinstance(problem.block, AttentionBlock):
            raise InputValueError(f"{self}: {type(problem.block).__name__} has no bfloat16 network; give another guess")
        solver = Solver(Whole(), self.guess, Stopping(self.count))
        result = sweep(problem, solver, replace(options, tolerance=None), in_bf16=True)
        return Start(result.x, result.progress.sweeps, result.sweeps, result.token_evaluations)
