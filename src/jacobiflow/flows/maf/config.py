"""The shape of a MAF."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jacobiflow.checks import check_number
from jacobiflow.errors import InputValueError
from jacobiflow.flows.config import check_sizes, check_totals


@dataclass(frozen=True)
class MAFConfig:
    """Shape of a MAF.

    Each block has `hidden_layers` layers of `hidden_features` units. Pixels p in [0, 1] enter as the logit of
    `logit_alpha` + (1 - 2 `logit_alpha`) p, which keeps the ends finite.

    **Raises** `TypeError` for other kinds of values, `ValueError` where sizes are not positive or above the limits of
    `jacobiflow.flows.config`, or `logit_alpha` is not between 0 and 1/2.
    """

    in_channels: int
    image_size: int
    hidden_features: int
    num_blocks: int
    hidden_layers: int = 2
    num_classes: int = 0
    logit_alpha: float = 1e-6

    def __post_init__(self) -> None:
        check_sizes(self, ("in_channels", "image_size", "hidden_features", "num_blocks", "hidden_layers"))
        give = "a small positive number, below 0.5"
        check_number("logit_alpha", self.logit_alpha, math.ulp(0.0), give)
        if self.logit_alpha >= 0.5:
            raise InputValueError(f"logit_alpha={self.logit_alpha}: give {give}")
        check_totals(self, self.num_blocks * self.hidden_layers)

    @property
    def num_tokens(self) -> int:
        """T, the number of pixels, in all channels."""
        return self.in_channels * self.image_size**2

    @property
    def token_channels(self) -> int:
        """C: a token is one value."""
        return 1

    @property
    def noise_std(self) -> float:
        """0: a MAF is trained on uniformly dequantised images, which carry no Gaussian noise."""
        return 0.0
