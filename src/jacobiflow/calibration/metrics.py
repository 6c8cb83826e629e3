"""The paper's two metrics: IGM says where to start (eq. 4), CRM which blocks are tough (eq. 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.checks import check_choice, check_fields, check_floating, check_number, check_type
from jacobiflow.errors import InputValueError
from jacobiflow.flows.base import Block
from jacobiflow.solvers import Guess, Segments, no_gradients
from jacobiflow.solvers.solve import check_tokens

Norm = Literal[2, "fro", 1]
NORMS: tuple[Norm, ...] = (2, "fro", 1)
DOMINANCE = 1 / 3
"""The share of the remaining blocks' CRM above which a block is tough by default, see `tough_blocks`."""


@dataclass(frozen=True)
class Components:
    """The parts of CRM = |Sigma^-1 X| |W_s| + |W_u| (Appendix C of the paper)."""

    scaled_input: float
    scale_weight: float
    shift_weight: float

    @property
    def crm(self) -> float:
        """Eq. (5)."""
        return self.scaled_input * self.scale_weight + self.shift_weight


@dataclass(frozen=True)
class Metrics:
    """IGM and CRM of the blocks of a flow in encoding order, or of the segments of one block in causal order.

    Attributes:
        igm: Per block, a number for each guess.
        components: Per block, the components of CRM; `None` if the flow has no linear output layer, for which CRM is
            not defined.
    """

    igm: tuple[Mapping[str, float], ...]
    components: tuple[Components, ...] | None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.components is not None and len(self.components) != len(self.igm):
            raise InputValueError(
                f"metrics: components of {len(self.components)} blocks or segments, IGM of {len(self.igm)}"
            )

    @property
    def crm(self) -> tuple[float, ...]:
        """Eq. (5). Raises ValueError if it is not defined."""
        if self.components is None:
            raise InputValueError(
                "CRM is not defined: the flow's scale and shift do not end in a linear layer; use IGM"
            )
        return tuple(part.crm for part in self.components)

    @property
    def crm_percent(self) -> tuple[float, ...]:
        """Each block's share of the sum of CRM, in percent (Table 2 of the paper)."""
        total = sum(self.crm)
        return tuple(100 * crm / total if total else 0.0 for crm in self.crm)

    @property
    def tough_blocks(self) -> tuple[int, ...]:
        """`tough_blocks` of `crm`."""
        return tough_blocks(self.crm)

    def best_guess(self, block: int) -> str:
        """The name of the guess with the smallest IGM; of equals, the first of `igm[block]`."""
        return min(self.igm[block], key=lambda name: self.igm[block][name])


def tough_blocks(crm: Sequence[float], dominance: float = DOMINANCE) -> tuple[int, ...]:
    """Finds the blocks whose CRM dominates: the ones to stack (end of section 3.4 of the paper).

    The block with the largest CRM is taken out, again and again, while its share of the sum over the blocks that remain
    is above `dominance`: by default a third, so that it weighs half as much as all others together. The paper gives no
    number; any between 0.33 and 0.41 picks the blocks that it picks from its Table 2. Of one or two remaining blocks
    none dominates: the larger one's share is at least 0.5 whatever they are.

    Example:
        >>> tough_blocks([141.2, 9.3, 1.4, 1.8, 7.7, 5.1, 3.1, 19.8])  # Img64cond, Table 2 of the paper
        (0, 7)
    """
    crm = check_type("crm", crm, tuple[float, ...])
    dominance = check_number("dominance", dominance)
    remaining = dict(enumerate(crm))
    tough = []
    while len(remaining) > 2:
        block = max(remaining, key=lambda i: remaining[i])
        if not remaining[block] > dominance * sum(remaining.values()) and remaining[block] < float("inf"):
            break
        tough.append(block)
        del remaining[block]
    return tuple(sorted(tough))


def matrix_norm(matrix: Float[Tensor, "t c"], norm: Norm) -> float:
    """Computes the spectral norm (2), the Frobenius norm ("fro") or the largest absolute column sum (1), in float64.

    It is infinite if an entry is not finite: a guess that overflows is as bad as can be.
    """
    check_floating("matrix", matrix, ("rows", "columns"))
    norm = check_choice("norm", norm, NORMS)
    if not torch.isfinite(matrix).all():
        return float("inf")
    return float(torch.linalg.matrix_norm(matrix.double(), ord=norm))


def segment_runs(length: int, count: int) -> list[slice]:
    """The `count` runs of tokens of `Segments(count)`."""
    partition = Segments(count)
    partition.check(length)
    stops = [0]
    while stops[-1] < length:
        stops.append(partition.stop(stops[-1], length))
    return [slice(start, stop) for start, stop in pairwise(stops)]


def initial_residuals(
    block: Block, x: Float[Tensor, "b t c"], z: Float[Tensor, "b t c"], guesses: Mapping[str, Guess],
    context: Tensor | None = None, count: int = 1,
) -> dict[str, Float[Tensor, "b t c"]]:  # fmt: skip
    """Computes g(X^(0)) - X*, the residual in IGM (eq. 4), for each guess.

    X* is `x`, the solution at `z`. With `count` > 1 it is that of Gauss-Seidel-Jacobi: each of the `count` segments is
    swept once from the guess, the segments before it being solved.
    """
    check_tokens(block, z, context, x=x)
    with no_gradients(block):
        cache = block.init_cache(z, context)
        starts = {name: guess(z) for name, guess in guesses.items()}
        residuals = {name: torch.empty_like(x) for name in guesses}
        for run in segment_runs(z.shape[1], count):
            for name, start in starts.items():
                mixed = torch.cat((x[:, : run.start], start[:, run.start :]), dim=1)
                residuals[name][:, run] = block.update(mixed, z, run.start, run.stop, cache) - x[:, run]
            if run.stop < z.shape[1]:
                block.update(x, z, run.start, run.stop, cache)  # the keys of the solution, for the next segment
    return {name: values.clone() for name, values in residuals.items()}  # outside inference mode, ordinary tensors
