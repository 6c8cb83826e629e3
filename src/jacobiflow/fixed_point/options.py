"""The options of a solve, the same from the public functions down to the sweeps."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Literal

from jacobiflow.utils.checks import check_choice, check_count, check_number, check_positive

CertifyMode = bool | Literal["always"]
"""Whether residuals are measured: `False` for none, "always" also for answers that are exact by construction."""

DEFAULT_TOLERANCE = 1e-3
"""The largest residual |g(x) - x| of a sample, in the units of x, unless a caller gives another."""
_MAX_BATCH_SIZE = 100_000_000


@dataclass(frozen=True)
class SolveOptions:
    """The options of `solve`, where they are explained. The time limit begins now."""

    tolerance: float | None = None
    certify: CertifyMode = True
    batch_size: int | None = None
    time_limit: float | None = None
    _end: float = field(init=False, repr=False, compare=False, default=math.inf)

    def __post_init__(self) -> None:
        check_choice("certify", self.certify, (True, False, "always"))
        if self.tolerance is not None:
            object.__setattr__(self, "tolerance", check_number("tolerance", self.tolerance))
        if self.batch_size is not None:
            object.__setattr__(self, "batch_size", check_count("batch_size", self.batch_size, maximum=_MAX_BATCH_SIZE))
        if self.time_limit is not None:
            check_positive("time_limit", self.time_limit)
            object.__setattr__(self, "_end", time.perf_counter() + self.time_limit)

    def check_time(self) -> None:
        """Raises TimeoutError if the time limit is over."""
        if time.perf_counter() > self._end:
            raise TimeoutError(f"not solved within time_limit={self.time_limit:g} s")
