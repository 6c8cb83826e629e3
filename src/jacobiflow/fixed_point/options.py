"""The options of a solve, the same from the public functions down to the sweeps."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal

from jacobiflow.utils.checks import check_choice, check_count, check_number

CertifyMode = bool | Literal["always"]
"""Whether residuals are measured: `False` for none, "always" also for answers that are exact by construction."""

DEFAULT_TOLERANCE = 1e-3
"""The largest residual |g(x) - x| of a sample, in the units of x, unless a caller gives another."""
_MAX_BATCH_SIZE = 100_000_000


@dataclass(frozen=True)
class SolveOptions:
    """The options of `solve`, where they are explained.

    Attributes:
        deadline: The time of `time.perf_counter` after which TimeoutError is raised.
    """

    tolerance: float | None = DEFAULT_TOLERANCE
    certify: CertifyMode = True
    batch_size: int | None = None
    deadline: float = math.inf

    def __post_init__(self) -> None:
        check_choice("certify", self.certify, (True, False, "always"))
        if self.tolerance is not None:
            object.__setattr__(self, "tolerance", check_number("tolerance", self.tolerance))
        if self.batch_size is not None:
            object.__setattr__(self, "batch_size", check_count("batch_size", self.batch_size, maximum=_MAX_BATCH_SIZE))

    def check_time(self) -> None:
        """Raises TimeoutError after the deadline."""
        if time.perf_counter() > self.deadline:
            raise TimeoutError("not solved within the time limit")
