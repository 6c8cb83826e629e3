"""The outcome of a run, as numbers and as a sentence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """Counts of the samples that are certified, solved again, above the tolerance, or lost.

    Attributes:
        num: The number of samples.
        tolerance: The largest residual allowed in any block; `None` if a block stops after a number of sweeps.
        residual: The largest finite residual; `None` without certificates.
        exact: Every block of every sample was solved token by token.
        resolved: Samples that some block solved again token by token.
        above: Samples above the tolerance, by the rounding of the network.
        lost: Samples without an image, since the exact inverse overflows.
    """

    num: int
    tolerance: float | None
    residual: float | None
    exact: bool
    resolved: int
    above: int
    lost: int

    @property
    def has_shortfall(self) -> bool:
        """True if a sample was measured and is neither exact nor within a tolerance, or if one is lost."""
        uncertified = self.residual is not None and self.tolerance is None and not self.exact
        return uncertified or self.above > 0 or self.lost > 0

    def __str__(self) -> str:
        """One sentence for the user, with the remedy if there is a shortfall."""
        if self.exact:
            parts = [f"{self.num - self.lost:,} exact, since every block was solved token by token"]
        elif self.residual is None:
            parts = ["not certified, since certificates were turned off"]
        elif self.tolerance is None:
            parts = [
                "not certified, since the strategy stops after a fixed number of sweeps",
                f"the largest residual is {self.residual:.1e}",
            ]
        else:
            within = self.num - self.above - self.lost
            parts = [f"{within:,} certified to {self.tolerance:g}"]
        if self.resolved:
            parts.append(f"{self.resolved:,} solved again token by token")
        if self.above:
            parts.append(
                f"{self.above:,} above the tolerance, up to {self.residual:.1e}, by the rounding of the network: raise "
                "the tolerance, or use a wider dtype"
            )
        if self.lost:
            parts.append(
                f"{self.lost:,} lost, since the exact inverse overflows too: lower the guidance, or use a wider dtype"
            )
        return f"{self.num:,} sample{'s' * (self.num > 1)}: {'; '.join(parts)}"
