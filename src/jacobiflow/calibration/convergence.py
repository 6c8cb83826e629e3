"""Distances of plain sweeps to the solution, sweep by sweep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.calibration.metrics import segment_runs
from jacobiflow.checks import check_fields
from jacobiflow.errors import InputValueError
from jacobiflow.flows.base import Block
from jacobiflow.solvers import Guess, no_gradients
from jacobiflow.solvers.solve import check_tokens

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)
_SETTLED = 0.1 * min(TOLERANCES)  # the last bits of a float32 keep changing for as many sweeps as there are tokens


@dataclass(frozen=True)
class Trace:
    """Distance to X*, the largest |X^(k) - X*| over tokens and channels, after k = 0, 1, ... plain sweeps.

    Attributes:
        median: Median over the samples, entry k after k sweeps.
        largest: Largest over the samples.
        sweeps: For each of `TOLERANCES`, how many sweeps each sample takes until its distance stays within it; `None`
            if rounding keeps the distance above.
    """

    median: tuple[float, ...]
    largest: tuple[float, ...]
    sweeps: Mapping[float, tuple[int | None, ...]]

    def __post_init__(self) -> None:
        check_fields(self)
        lengths = {len(row) for row in self.sweeps.values()}
        if not self.median or len(self.median) != len(self.largest) or len(lengths) != 1 or 0 in lengths:
            raise InputValueError("trace: give a median and a largest distance for each k, and tolerances with counts")

    def slowest(self, tolerance: float) -> int | None:
        """The sweeps of the slowest sample; `None` if a sample stays above."""
        counts = self.reach(tolerance)
        return None if None in counts else max(count for count in counts if count is not None)

    def reach(self, tolerance: float) -> tuple[int | None, ...]:
        """`sweeps[tolerance]`. Raises ValueError if that was not measured."""
        if tolerance not in self.sweeps:
            raise InputValueError(f"tolerance {tolerance}: measured are {', '.join(f'{t:g}' for t in self.sweeps)}")
        return self.sweeps[tolerance]

    @classmethod
    def of(cls, distances: Float[Tensor, "k b"]) -> Trace:
        """The trace of `distances`: a row for each number of sweeps, a column for each sample."""
        return cls(
            median=tuple(distances.median(dim=1).values.tolist()),
            largest=tuple(distances.amax(dim=1).tolist()),
            sweeps={tolerance: tuple(_reached(row, tolerance) for row in distances.T) for tolerance in TOLERANCES},
        )


def distances(
    block: Block, x: Float[Tensor, "b t c"], z: Float[Tensor, "b t c"], guess: Guess, context: Tensor | None = None,
    count: int = 1,
) -> list[Float[Tensor, "k b"]]:  # fmt: skip
    """Measures the largest |X^(k) - X*| of each sample after k = 0, 1, ... plain sweeps of a segment's tokens.

    X* is `x`, the solution at `z`. Each of the `count` segments starts from the guess, those before it being solved
    (Figure 5 of the paper; one segment is Figure 2). It ends with a sweep that changes no entry by more than 1e-5, a
    tenth of the smallest of `TOLERANCES`: coming near X* is not enough, because an error may grow again before it dies.
    As many sweeps as the segment has tokens make it exact (Proposition 1). As in `solve`, a token that overflows is set
    back to the guess; the distance after such a sweep is infinite.
    """
    check_tokens(block, z, context, x=x)
    curves = []
    with no_gradients(block):
        cache = block.init_cache(z, context)
        start = guess(z)
        for run in segment_runs(z.shape[1], count):
            current = torch.cat((x[:, : run.start], start[:, run.start :]), dim=1)
            curve = [_distance(current[:, run], x[:, run])]
            for front in range(run.start, run.stop):  # tokens before it are final, by Proposition 1
                rest = slice(front, run.stop)
                g = block.update(current, z, front, run.stop, cache)
                is_settled = float((g - current[:, rest]).abs().max()) <= _SETTLED
                curve.append(_distance(torch.cat((current[:, run.start : front], g), dim=1), x[:, run]))
                current[:, rest] = torch.where(torch.isfinite(g).all(dim=-1, keepdim=True), g, start[:, rest])
                if is_settled:
                    break
            curves.append(torch.stack(curve))
            if run.stop < z.shape[1]:
                block.update(x, z, run.start, run.stop, cache)  # the keys of the solution, for the next segment
    return [curve.clone() for curve in curves]  # outside inference mode, ordinary tensors


def joined(parts: Iterable[Float[Tensor, "k b"]]) -> Float[Tensor, "k n"]:
    """Curves of several batches side by side; a shorter one stays at its last distance."""
    parts = list(parts)
    longest = max(len(part) for part in parts)
    return torch.cat([torch.cat((part, part[-1:].expand(longest - len(part), -1))) for part in parts], dim=1)


def _distance(x: Tensor, answer: Tensor) -> Float[Tensor, " b"]:
    return (x - answer).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).amax(dim=(1, 2))


def _reached(curve: Float[Tensor, " k"], tolerance: float) -> int | None:
    above = (curve > tolerance).nonzero()
    sweeps = int(above[-1]) + 1 if len(above) else 0
    return sweeps if sweeps < len(curve) else None
