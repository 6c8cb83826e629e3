"""The paper's two metrics: IGM says where to start (eq. 4), CRM which blocks are tough (eq. 5)."""

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


def tough_blocks(crm: Sequence[float], dominance: float = 1 / 3) -> tuple[int, ...]:
    """Finds the blocks whose CRM dominates: the ones to stack (end of section 3.4 of the paper).

    The block with the largest CRM is taken out, again and again, while its share of the sum over the blocks that remain
    is above `dominance`: by default a third, so that it weighs half as much as all others together. The paper gives no
    number; any between 0.33 and 0.41 picks the blocks that it picks from its Table 2. Of one or two remaining blocks
    none dominates: the larger one's share is at least 0.5 whatever they are.

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

    It is infinite if an entry is not finite: a guess that overflows is as bad as can be.
    """
    if not torch.isfinite(matrix).all():
        return float("inf")
    return float(torch.linalg.matrix_norm(matrix.double(), ord=norm))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Computes Spearman's rank correlation, equals sharing their mean rank; NaN if one side is constant."""
    with np.errstate(invalid="ignore"):
        return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    """The number of smaller values less that of larger ones, for each: twice its mean rank, shifted."""
    column = np.asarray(values)[:, None]
    return (column > values).sum(axis=1) - (column < values).sum(axis=1)
