"""Guesses: the start of an iteration."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from jacobiflow.blocks.tokens import Tokens
from jacobiflow.fixed_point.options import SolveOptions
from jacobiflow.fixed_point.problem import Problem
from jacobiflow.fixed_point.registry import Piece, register_piece
from jacobiflow.utils.checks import check_floating


class Start(NamedTuple):
    """The start of an iteration, and the cost of the sweeps that led to it.

    Attributes:
        x: X^(0).
        sample_sweeps: Sweeps of each sample.
        sweeps: Sweeps of all batches.
        token_evaluations: Tokens times samples over these sweeps.
    """

    x: Tokens
    sample_sweeps: int | Tensor = 0
    sweeps: int = 0
    token_evaluations: int = 0


class Guess(Piece):
    """Chooses X^(0), as a rule from the block's input.

    Example:
        >>> class Ones(jf.Guess):
        ...     def __call__(self, z):
        ...         return torch.ones_like(z)
        >>> solver = jf.Solver(jf.Whole(), Ones())
    """

    @abstractmethod
    def __call__(self, z: Tokens) -> Tokens:
        """Returns X^(0)."""

    def start(self, problem: Problem, options: SolveOptions) -> Start:
        """Returns X^(0) for a problem, of which a guess may also use the block."""
        return Start(self(problem.z))


@register_piece("latent")
@dataclass(frozen=True)
class Latent(Guess):
    """X^(0) = Z, the block's input: neighbouring blocks change an image little (section 3.2 of the paper).

    Example:
        >>> jf.Latent()(torch.ones(1, 2, 1)).flatten()
        tensor([1., 1.])
    """

    def __call__(self, z: Tokens) -> Tokens:
        return z


@register_piece("zeros")
@dataclass(frozen=True)
class Zeros(Guess):
    """X^(0) = [z_1, 0, ..., 0], for blocks in which Z overflows (section 3.2 of the paper).

    Example:
        >>> jf.Zeros()(torch.ones(1, 2, 1)).flatten()
        tensor([1., 0.])
    """

    def __call__(self, z: Tokens) -> Tokens:
        x = torch.zeros_like(z)
        x[:, :1] = z[:, :1]
        return x


@dataclass(frozen=True, eq=False)
class WarmStart(Guess):
    """X^(0) = `value`, an approximate answer that is to be improved, such as that of a learned inverse.

    Args:
        value: Tokens of the shape of z, (B, T, C).

    Example:
        >>> x = torch.zeros(1, 2, 1)
        >>> solver = jf.Solver(jf.Whole(), jf.WarmStart(x))
    """

    value: Tokens

    def __call__(self, z: Tokens) -> Tokens:
        check_floating("WarmStart: value", self.value, tuple(z.shape))
        return self.value.to(z)
