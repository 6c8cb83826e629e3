"""The paper's two metrics: IGM ranks the guesses (eq. 4), CRM ranks the blocks (eq. 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.errors import InputValueError

Norm = Literal[2, "fro", 1]
NORMS: tuple[Norm, ...] = (2, "fro", 1)


@dataclass(frozen=True)
class Components:
    """The parts of CRM = |Sigma^-1 X| |W_s| + |W_u| (Appendix C of the paper)."""

    scaled_input: float
    scale_weight: float
    shift_weight: float

    @property
    def crm(self) -> float:
        """CRM of the block (eq. 5)."""
        return self.scaled_input * self.scale_weight + self.shift_weight


@dataclass(frozen=True)
class Metrics:
    """IGM and CRM of the blocks of a flow in encoding order, or of the segments of one block in causal order.

    Attributes:
        igm: Per block, the IGM of each guess.
        components: Per block, the components of CRM; `None` if CRM is not defined because a block's scale and shift do
            not end in a linear layer.
    """

    igm: tuple[Mapping[str, float], ...]
    components: tuple[Components, ...] | None

    @property
    def crm(self) -> tuple[float, ...]:
        """Per block, CRM (eq. 5). Raises ValueError if it is not defined."""
        if self.components is None:
            raise InputValueError(
                "CRM is not defined: no `output_weights`, or the scale and shift do not end in a linear layer; use IGM"
            )
        return tuple(part.crm for part in self.components)

    @property
    def crm_percent(self) -> tuple[float, ...]:
        """Per block, the percentage of the sum of CRM (Table 2 of the paper)."""
        total = sum(self.crm)
        return tuple(100 * crm / total if total else 0.0 for crm in self.crm)

    @property
    def tough_blocks(self) -> tuple[int, ...]:
        """Blocks whose CRM dominates; see `tough_blocks`."""
        return tough_blocks(self.crm)

    def best_guess(self, block: int) -> str:
        """Returns the name of the guess with the smallest IGM; the first one in `igm[block]` if several are equal."""
        return min(self.igm[block], key=lambda name: self.igm[block][name])


def tough_blocks(crm: Sequence[float], dominance: float = 1 / 3) -> tuple[int, ...]:
    """Finds the blocks whose CRM dominates: the ones to stack (end of section 3.4 of the paper).

    A block is tough if its CRM is the largest, and is above the fraction `dominance` of the sum over all blocks. It is
    then removed, and the rule is applied to the others. The last two blocks are never tough: the larger one has at
    least half of their sum. The paper gives no number for `dominance`. Any from 0.33 to 0.41 selects the blocks that
    the paper selects in its Table 2.

    Example:
        >>> tough_blocks([141.2, 9.3, 1.4, 1.8, 7.7, 5.1, 3.1, 19.8])  # Img64cond, Table 2 of the paper
        (0, 7)
    """
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

    The norm is infinite if an entry is not finite, so that a guess that overflows ranks last.
    """
    if not torch.isfinite(matrix).all():
        return float("inf")
    return float(torch.linalg.matrix_norm(matrix.double(), ord=norm))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Computes Spearman's rank correlation; equal values share their mean rank. NaN if one side is constant."""
    with np.errstate(invalid="ignore"):
        return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Counts smaller minus larger values for each value: its mean rank, times 2 and shifted."""
    column = np.asarray(values)[:, None]
    return (column > values).sum(axis=1) - (column < values).sum(axis=1)
