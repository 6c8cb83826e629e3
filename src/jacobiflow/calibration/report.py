"""The report of a calibration: its measurements, and numbers derived from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jacobiflow.blocks.guidance import Guidance
from jacobiflow.calibration.convergence import ConvergenceCurve
from jacobiflow.calibration.metrics import Components, Metrics, Norm, rank_correlation
from jacobiflow.errors import InputValueError
from jacobiflow.fixed_point import Guess, Latent, Zeros
from jacobiflow.models.checkpoints.fingerprint import check_fingerprint
from jacobiflow.models.flow import Flow, check_flow
from jacobiflow.utils.checks import check_choice, check_count, check_number
from jacobiflow.utils.deprecation import renamed_attributes, retired
from jacobiflow.utils.serialization import JsonDocument

GUESSES: Mapping[str, Guess] = {"latent": Latent(), "zeros": Zeros()}
"""The guesses of the paper, by their names in `CalibrationReport.igm`."""
LatentSource = Literal["images", "noise"]  # latents that encode images, or fresh ones


@renamed_attributes(traced="num_convergence_samples")
@dataclass(frozen=True)
class CalibrationSettings:
    """The settings of a calibration; see `jacobiflow.calibrate`."""

    num_images: int
    has_context: bool
    norm: Norm
    guidance: Guidance | None
    segments: int
    num_convergence_samples: int
    seed: int


class MeanStd(NamedTuple):
    """Mean and population standard deviation over classes."""

    mean: float
    std: float

    @classmethod
    def from_values(cls, values: Sequence[float]) -> MeanStd:
        """Computes both from a value for each class."""
        with np.errstate(invalid="ignore"):  # the standard deviation of an infinity is NaN
            return cls(float(np.mean(values)), float(np.std(values)))


@dataclass(frozen=True)
class ClassSpread:
    """Variation of one block's metrics over classes (Appendix E of the paper, Tables 8 and 9).

    Attributes:
        crm_rank: Rank of its CRM among the blocks, from 1 for the smallest; `None` if CRM is not defined.
        crm_percent: Percentage of the sum of CRM; `None` if CRM is not defined.
        igm: IGM of each guess.
        num_best: For each guess, the number of classes in which it has the smallest IGM.
    """

    crm_rank: MeanStd | None
    crm_percent: MeanStd | None
    igm: Mapping[str, MeanStd]
    num_best: Mapping[str, int]


@renamed_attributes(traces="curves", segment_traces="segment_curves")
@dataclass(frozen=True, repr=False)
class CalibrationReport(JsonDocument):
    """The measurements of `jacobiflow.calibrate`. Blocks are numbered in encoding order.

    Attributes:
        fingerprint: Fingerprint of the flow; see `check`.
        num_tokens: Number of tokens T.
        token_dim: Number of values C of a token.
        settings: Settings of the calibration.
        metrics: IGM and CRM in each norm. `igm`, `crm` and so on are in the norm of the settings.
        segment_metrics: For each tough block, the metrics of its `settings.segments` segments.
        class_metrics: For each class, the metrics over its images alone; empty without `per_class=True`.
        curves: From each source of latents, per block and guess, the distance to the solution by number of sweeps. The
            sources are "images" (latents that encode them) and "noise" (fresh latents); under guidance only "noise".
        segment_curves: For each tough block and number of segments, a curve for each segment. They are from fresh
            latents and the block's best guess, and the segments before are solved.
        gamma: Per block, the spectral norm of the error matrix at the solutions of the first eight samples of `curves`:
            images, or under guidance fresh latents.

    Example:
        >>> report = jf.CalibrationReport.load(jf.find_report(jf.load("digits-p1")))
        >>> report.num_blocks, report.best_guess(0)
        (4, 'latent')
    """

    _name, _version, _remedy = "report", 5, "; make it anew with jacobiflow calibrate"

    fingerprint: str
    num_tokens: int
    token_dim: int
    settings: CalibrationSettings
    metrics: Mapping[Norm, Metrics]
    segment_metrics: Mapping[int, Metrics]
    class_metrics: Mapping[int, Metrics]
    curves: Mapping[LatentSource, tuple[Mapping[str, ConvergenceCurve], ...]]
    segment_curves: Mapping[int, Mapping[int, tuple[ConvergenceCurve, ...]]]
    gamma: tuple[tuple[float, ...], ...]

    @classmethod
    def from_json(cls, value: Any) -> CalibrationReport:
        """Inverse of `to_json`. Up to format 4 a report had the guess mean_affine, from which its sweeps started."""
        if isinstance(value, dict) and "mean_affine" in value:
            raise InputValueError(f"{retired('the guess mean_affine')}; plan needs no report")
        return super().from_json(value)

    def __repr__(self) -> str:
        tough = f", tough: {self.tough_blocks}" if self.components is not None else ""
        guidance = f", guidance {self.settings.guidance}" if self.settings.guidance else ""
        return f"CalibrationReport({self.settings.num_images} images, {self.num_blocks} blocks{tough}{guidance})"

    @property
    def num_blocks(self) -> int:
        """Number of blocks L."""
        return len(self.gamma)

    @property
    def igm(self) -> tuple[Mapping[str, float], ...]:
        """Per block, the IGM of each guess, "latent" and "zeros" (eq. 4, Table 1 of the paper)."""
        return self._norm_metrics.igm

    @property
    def crm(self) -> tuple[float, ...]:
        """Per block, CRM (eq. 5, Table 2 of the paper). Raises ValueError if it is not defined."""
        return self._norm_metrics.crm

    @property
    def crm_percent(self) -> tuple[float, ...]:
        """Per block, the percentage of the sum of CRM."""
        return self._norm_metrics.crm_percent

    @property
    def components(self) -> tuple[Components, ...] | None:
        """Per block |Sigma^-1 X|, |W_s| and |W_u| (Table 6 of the paper); `None` if CRM is not defined."""
        return self._norm_metrics.components

    @property
    def tough_blocks(self) -> tuple[int, ...]:
        """Blocks whose CRM dominates; see `jacobiflow.calibration.tough_blocks`."""
        return self._norm_metrics.tough_blocks

    @property
    def _norm_metrics(self) -> Metrics:
        return self.metrics[self.settings.norm]

    def best_guess(self, block: int) -> str:
        """Returns the name of the guess with the smallest IGM in `block` (section 3.2 of the paper)."""
        return self._norm_metrics.best_guess(check_count("block", block, 0, self.num_blocks - 1))

    def guess(self, block: int) -> Guess:
        """Returns the guess that `best_guess` names."""
        return GUESSES[self.best_guess(block)]

    def mean_sweeps(self, source: LatentSource, tolerance: float, guess: str | None = None) -> tuple[float, ...]:
        """Averages, per block, the samples' numbers of sweeps to a tolerance.

        Args:
            source: Source of the latents: "images" or "noise".
            tolerance: One that was measured: 1e-1, 1e-2, 1e-3 or 1e-4. A sample that rounding keeps above it counts T.
            guess: Name of the guess; by default each block's best by IGM.
        """
        return tuple(float(np.mean(row)) for row in self._sweeps(source, tolerance, guess))

    def slowest_sweeps(self, source: LatentSource, tolerance: float, guess: str | None = None) -> tuple[int, ...]:
        """Returns, per block, the sweeps of the slowest sample; see `mean_sweeps`."""
        return tuple(max(row) for row in self._sweeps(source, tolerance, guess))

    def _sweeps(self, source: LatentSource, tolerance: float, guess: str | None) -> list[tuple[int, ...]]:
        check_choice("source", source, tuple(self.curves))
        tolerance = check_number("tolerance", tolerance)
        if guess is not None:
            check_choice("guess", guess, tuple(GUESSES))
        return [
            row[guess or self.best_guess(block)].sweeps_to_tolerance(tolerance, self.num_tokens)
            for block, row in enumerate(self.curves[source])
        ]

    def rank_correlation(
        self, metric: Literal["crm", "gamma"], source: LatentSource = "noise", tolerance: float = 1e-3
    ) -> float:
        """Computes the rank correlation of the blocks' metric with their `mean_sweeps`.

        "gamma" is the mean over samples of the error matrix's spectral norm; CRM is a proxy of it (Appendix B of the
        paper).
        """
        check_choice("metric", metric, ("crm", "gamma"))
        values = self.crm if metric == "crm" else tuple(float(np.mean(norms)) for norms in self.gamma)
        return rank_correlation(values, self.mean_sweeps(source, tolerance))

    def class_spread(self) -> tuple[ClassSpread, ...]:
        """Computes the variation of each block's metrics over classes; needs `per_class=True` in the calibration."""
        if not self.class_metrics:
            raise InputValueError("no metrics per class in this report: calibrate with per_class=True and labels")
        return tuple(_class_spread(list(self.class_metrics.values()), block) for block in range(self.num_blocks))

    def check(self, flow: Flow) -> None:
        """Raises ValueError if the report is of another flow; another dtype is accepted."""
        check_flow(flow)
        check_fingerprint(self.fingerprint, flow, "the report is of")


def find_report(flow: Flow) -> Path | None:
    """Finds the report of the flow's guidance: report.json or report-*.json in its model folder.

    Without a report of this guidance, returns one of another guidance, report.json first; without any report, `None`.

    Example:
        >>> jf.find_report(jf.load("digits-p1")).name
        'report.json'
    """
    check_flow(flow)
    files = [file for file in flow.report_files if file.is_file()]
    same = (f for f in files if len(files) == 1 or CalibrationReport.load(f).settings.guidance == flow.guidance)
    return next(same, next(iter(files), None))


def _class_spread(classes: Sequence[Metrics], block: int) -> ClassSpread:
    is_defined = classes[0].components is not None
    ranks = [1 + sum(crm < m.crm[block] for crm in m.crm) for m in classes] if is_defined else []
    best = [metrics.best_guess(block) for metrics in classes]
    return ClassSpread(
        crm_rank=MeanStd.from_values(ranks) if is_defined else None,
        crm_percent=MeanStd.from_values([m.crm_percent[block] for m in classes]) if is_defined else None,
        igm={name: MeanStd.from_values([m.igm[block][name] for m in classes]) for name in GUESSES},
        num_best={name: best.count(name) for name in GUESSES},
    )
