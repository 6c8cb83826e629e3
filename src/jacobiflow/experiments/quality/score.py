"""The figures of a comparison, and which rows are worth more samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jacobiflow.baselines import SEQUENTIAL
from jacobiflow.evaluation.distances import Statistics, frechet_distance
from jacobiflow.evaluation.features import extract
from jacobiflow.evaluation.fidelity import PixelDifference, pixel_difference
from jacobiflow.experiments.quality.experiment import ORIGINAL
from jacobiflow.measuring import Timing
from jacobiflow.storage import SampleFolder
from jacobiflow.strategy import is_auto

_EXACT = (ORIGINAL, SEQUENTIAL)
WITHIN = 0.01  # of the original's distance: what the paper's tables print bold


@dataclass(frozen=True)
class Row:
    """One row of a comparison.

    **Attributes:** `name`; `num` samples; `distance`, Fréchet, to the real images; `relative`, by what share that is
    above the original's over the same latents (below 0: nearer); `max` and `rms`, the largest and the root-mean-square
    difference of an entry to the exact images; `pixels`, a `PixelDifference`; `resolved`, the share solved again
    sequentially; `seconds`, a `Timing` of one batch, denoising included; `rate`, how many times as fast that is as the
    original, which is denoised as well.
    """

    name: str
    num: int
    distance: float
    relative: float
    max: float
    rms: float
    pixels: PixelDifference
    resolved: float
    seconds: Timing
    rate: float

    @property
    def within(self) -> bool:
        """Whether the distance is at most 1% above the original's."""
        return self.relative <= WITHIN


def score(
    folders: Mapping[str, SampleFolder], num: int, features: nn.Module, real: Statistics, timings: Mapping[str, Any]
) -> list[Row]:
    """A `Row` of the first `num` samples of each folder.

    **Arguments:** `folders` by name, as `draw` gives them, "Original" among them; `features` of images, whose
    statistics over the real ones are `real`; `timings` as the function of that name gives them.
    """

    def first(folder: SampleFolder) -> Tensor:
        return torch.cat(list(folder.batches()))[:num]

    exact = first(folders[ORIGINAL])
    base = frechet_distance(real, Statistics.of(extract(features, [exact])))
    denoising = timings["denoise_seconds"]
    seconds = {
        name: Timing(*(row[entry] + denoising for entry in ("median", "min", "max")))
        for name, row in timings["rows"].items()
    }
    rows = []
    for name, folder in folders.items():
        images = first(folder)
        distance = frechet_distance(real, Statistics.of(extract(features, [images])))
        errors = _errors(folder)[:num]
        row = Row(
            name=name,
            num=len(images),
            distance=distance,
            relative=distance / base - 1,
            max=max(largest for largest, _ in errors),
            rms=math.sqrt(sum(rms * rms for _, rms in errors) / len(errors)),
            pixels=pixel_difference(images, exact),
            resolved=float(folder.resolved()[:num].double().mean()),
            seconds=seconds[name],
            rate=seconds[ORIGINAL].median / seconds[name].median,
        )
        rows.append(row)
    return rows


def finalists(rows: Sequence[Row]) -> list[str]:
    """The original, and the fastest within 1% of it among the rows of "auto" and among those that approximate.

    "sequential" is left out: its images are the original's.
    """
    close = sorted((row for row in rows if row.within and row.name not in _EXACT), key=lambda row: -row.rate)
    best = [next((row.name for row in close if is_auto(row.name) == planned), None) for planned in (False, True)]
    return [ORIGINAL, *(name for name in best if name is not None)]


def _errors(folder: SampleFolder) -> list[tuple[float, float]]:
    """The largest and the root-mean-square difference of each sample; null, JSON's infinity, is infinite."""
    pairs = [error for record in folder.records() for error in record.figures["errors"]]
    return [(math.inf if high is None else high, math.inf if rms is None else rms) for high, rms in pairs]
