"""The measurements of a calibration as data, and the strategy that the paper's Algorithm 1 makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from jacobiflow.blocks.guidance import Guidance
from jacobiflow.calibration.convergence import ConvergenceCurve
from jacobiflow.calibration.metrics import Components, Metrics, Norm, rank_correlation
from jacobiflow.errors import InputValueError
from jacobiflow.fixed_point import Guess, Latent, MeanAffine, Zeros
from jacobiflow.models.checkpoints.fingerprint import check_fingerprint
from jacobiflow.models.flow import Flow, check_flow
from jacobiflow.utils import serialization
from jacobiflow.utils.checks import check_choice, check_count, check_flag, check_kind, check_number

GUESS_NAMES = ("latent", "zeros", "mean_affine")
Start = Literal["images", "noise"]


def named_guesses(mean_affine: MeanAffine) -> dict[str, Guess]:
    """The guesses of a block by the names that `CalibrationReport.igm` uses."""
    return dict(zip(GUESS_NAMES, (Latent(), Zeros(), mean_affine), strict=True))


@dataclass(frozen=True)
class Settings:
    """The settings of a calibration; see `jacobiflow.calibrate`."""

    num_images: int
    labelled: bool
    norm: Norm
    guidance: Guidance | None
    segments: int
    traced: int
    seed: int


class Spread(NamedTuple):
    """Mean and (population) standard deviation over classes."""

    mean: float
    std: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of values, one for each class."""
        with np.errstate(invalid="ignore"):  # of an infinity there is no standard deviation: NaN
            return cls(float(np.mean(values)), float(np.std(values)))


@dataclass(frozen=True)
class ClassSpread:
    """Variation of one block's metrics over classes (Appendix E of the paper, Tables 8 and 9).

    Attributes:
        rank: Of its CRM among the blocks (1 is the smallest); `None` if CRM is not defined.
        percent: Its share of the sum of CRM; `None` if CRM is not defined.
        igm: IGM of each guess.
        wins: In how many classes each guess has the smallest IGM.
    """

    rank: Spread | None
    percent: Spread | None
    igm: Mapping[str, Spread]
    wins: Mapping[str, int]


@dataclass(frozen=True, repr=False)
class CalibrationReport(serialization.Document):
    """The measurements of `jacobiflow.calibrate`. Blocks are numbered in encoding order.

    Attributes:
        fingerprint: Of the flow's weights, see `check`.
        num_tokens: T.
        token_channels: C.
        settings: Settings of the calibration.
        metrics: IGM and CRM in each norm; `igm`, `crm` and so on are those in the norm of the settings.
        segment_metrics: For each tough block, the metrics of its `settings.segments` segments.
        class_metrics: For each class of the images, the metrics over its images alone; empty unless asked for.
        mean_affine: Per block, the calibrated guess.
        traces: From "images" (the latents that encode them) and from "noise" (fresh latents), per block and guess the
            distance to the solution sweep by sweep. Under guidance from "noise" only.
        segment_traces: For each tough block and number of segments, a trace per segment: from fresh noise and the
            block's best guess, the segments before it being solved.
        gamma: Per block, the spectral norm of the error matrix at the solution of each of the first eight traced
            images, or under guidance of the first eight fresh latents.

    Example:
        >>> report = jf.CalibrationReport.load(jf.find_report(jf.load("digits-p1")))
        >>> report.num_blocks, report.best_guess(0)
        (4, 'mean_affine')
    """

    _name, _version, _remedy = "report", 2, "; make it anew with jacobiflow calibrate"

    fingerprint: str
    num_tokens: int
    token_channels: int
    settings: Settings
    metrics: Mapping[Norm, Metrics]
    segment_metrics: Mapping[int, Metrics]
    class_metrics: Mapping[int, Metrics]
    mean_affine: tuple[MeanAffine, ...]
    traces: Mapping[Start, tuple[Mapping[str, ConvergenceCurve], ...]]
    segment_traces: Mapping[int, Mapping[int, tuple[ConvergenceCurve, ...]]]
    gamma: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        """Checks that the parts fit each other, which those of a file that was changed may not."""
        metrics = [*self.metrics.values(), *self.class_metrics.values()]
        rows = [row for starts in self.traces.values() for row in starts]
        segments = [item for counts in self.segment_traces.values() for item in counts.items()]
        traces = [trace for row in rows for trace in row.values()] + [trace for _, row in segments for trace in row]
        igm = [row for each in (*metrics, *self.segment_metrics.values()) for row in each.igm]
        per_block: list[Sized] = [*self.traces.values(), self.gamma, *(each.igm for each in metrics)]
        per_block += [each.components for each in metrics if each.components is not None]
        fits = {
            f"an entry for each of {self.num_blocks} blocks": {*map(len, per_block)} == {self.num_blocks},
            f"metrics in norm {self.settings.norm}": self.settings.norm in self.metrics,
            "traces from noise": "noise" in self.traces,
            f"values of {', '.join(GUESS_NAMES)}": all(row.keys() == set(GUESS_NAMES) for row in (*rows, *igm)),
            "a trace for each segment": all(count == len(row) > 0 for count, row in segments),
            "sweeps for each tolerance": all(all(trace.sweeps.values()) for trace in traces),
            "gamma of each block": all(self.gamma) and self.num_blocks > 0,
        }
        if missing := [part for part, is_there in fits.items() if not is_there]:
            raise InputValueError(f"its parts do not fit each other: it lacks {missing[0]}")

    def __repr__(self) -> str:
        tough = f", tough: {self.tough_blocks}" if self.components is not None else ""
        guidance = f", guidance {self.settings.guidance}" if self.settings.guidance else ""
        return f"Report({self.settings.num_images} images, {self.num_blocks} blocks{tough}{guidance})"

    @property
    def num_blocks(self) -> int:
        """L."""
        return len(self.mean_affine)

    @property
    def igm(self) -> tuple[Mapping[str, float], ...]:
        """Per block, the IGM of each guess: "latent", "zeros", "mean_affine" (eq. 4, Table 1 of the paper)."""
        return self._norm_metrics.igm

    @property
    def crm(self) -> tuple[float, ...]:
        """Per block, CRM (eq. 5, Table 2 of the paper). Raises ValueError if it is not defined."""
        return self._norm_metrics.crm

    @property
    def crm_percent(self) -> tuple[float, ...]:
        """Per block, the share in the sum of CRM, in percent."""
        return self._norm_metrics.crm_percent

    @property
    def components(self) -> tuple[Components, ...] | None:
        """Per block |Sigma^-1 X|, |W_s| and |W_u| (Table 6 of the paper); `None` if CRM is not defined."""
        return self._norm_metrics.components

    @property
    def tough_blocks(self) -> tuple[int, ...]:
        """Blocks whose CRM dominates, see `jacobiflow.calibration.tough_blocks`."""
        return self._norm_metrics.tough_blocks

    @property
    def _norm_metrics(self) -> Metrics:
        return self.metrics[self.settings.norm]

    def best_guess(self, block: int) -> str:
        """The name of the guess with the smallest IGM in `block` (section 3.2 of the paper)."""
        return self._norm_metrics.best_guess(check_count("block", block, 0, self.num_blocks - 1))

    def guess(self, block: int) -> Guess:
        """The guess that `best_guess` names."""
        name = self.best_guess(block)  # which checks the block
        return named_guesses(self.mean_affine[block])[name]

    def mean_sweeps(self, start: Start, tolerance: float, guess: str | None = None) -> tuple[float, ...]:
        """Averages, per block, the samples' numbers of plain sweeps to a tolerance of 1e-1, 1e-2, 1e-3 or 1e-4.

        A sample that rounding keeps above the tolerance counts T sweeps. The guess is by default the best one by IGM.
        """
        return tuple(float(np.mean(row)) for row in self._sweeps(start, tolerance, guess))

    def slowest_sweeps(self, start: Start, tolerance: float, guess: str | None = None) -> tuple[int, ...]:
        """As `mean_sweeps`, of the slowest sample."""
        return tuple(max(row) for row in self._sweeps(start, tolerance, guess))

    def _sweeps(self, start: Start, tolerance: float, guess: str | None) -> list[tuple[int, ...]]:
        check_choice("start", start, tuple(self.traces))
        tolerance = check_number("tolerance", tolerance)
        if guess is not None:
            check_choice("guess", guess, GUESS_NAMES)
        return [
            row[guess or self.best_guess(block)].sweeps_to_tolerance(tolerance, self.num_tokens)
            for block, row in enumerate(self.traces[start])
        ]

    def rank_correlation(
        self, metric: Literal["crm", "gamma"], start: Start = "noise", tolerance: float = 1e-3
    ) -> float:
        """Computes `rank_correlation` of a metric of the blocks with their `mean_sweeps`.

        "gamma" is the mean over samples of the error matrix's spectral norm, of which CRM is a proxy (Appendix B of
        the paper).
        """
        check_choice("metric", metric, ("crm", "gamma"))
        values = self.crm if metric == "crm" else tuple(float(np.mean(norms)) for norms in self.gamma)
        return rank_correlation(values, self.mean_sweeps(start, tolerance))

    def class_spread(self) -> tuple[ClassSpread, ...]:
        """Computes, per block, the variation over classes, if these were measured."""
        if not self.class_metrics:
            raise InputValueError("no metrics per class in this report: calibrate with per_class=True and labels")
        return tuple(_class_spread(list(self.class_metrics.values()), block) for block in range(self.num_blocks))

    def check(self, flow: Flow) -> None:
        """Raises ValueError if the report is of another flow: other weights, not just another dtype."""
        check_flow(flow)
        check_fingerprint(self.fingerprint, flow, "the report is of")


def find_report(flow: Flow) -> Path | None:
    """Finds the report, report.json or report-*.json in the flow's model folder, of its guidance.

    Without one of this guidance it is that of another, report.json first; without any it is `None`.

    Example:
        >>> jf.find_report(jf.load("digits-p1")).name
        'report.json'
    """
    return find_file(flow, "report", lambda file: CalibrationReport.load(file).settings.guidance)


def find_file(flow: Flow, name: str, guidance_of: Callable[[Path], Guidance | None]) -> Path | None:
    """The first file with this name that was made under the flow's guidance; else the first with this name."""
    check_flow(flow)
    files = [file for file in flow.report_files if file.name.startswith(name)]
    same = (file for file in files if len(files) == 1 or guidance_of(file) == flow.guidance)
    return next(same, next(iter(files), None))


def _class_spread(classes: Sequence[Metrics], block: int) -> ClassSpread:
    is_defined = classes[0].components is not None
    best = [metrics.best_guess(block) for metrics in classes]
    return ClassSpread(
        rank=Spread.of([1 + sum(crm < m.crm[block] for crm in m.crm) for m in classes]) if is_defined else None,
        percent=Spread.of([m.crm_percent[block] for m in classes]) if is_defined else None,
        igm={name: Spread.of([m.igm[block][name] for m in classes]) for name in GUESS_NAMES},
        wins={name: best.count(name) for name in GUESS_NAMES},
    )


def gs_jacobi_notation(
    report: CalibrationReport, tolerance: float = 1e-2, *, per_segment: bool = False, call_cost: float = 32.0
) -> str:
    """Proposes a strategy by Algorithm 1 of the paper: tough blocks by CRM, numbers of sweeps as measured.

    A tough block is cut into G segments of J sweeps. J is the number that the slowest sample traced needed in its
    slowest segment to come within `tolerance` of the solution. Of the G measured with J <= T // G, and of G = T with
    J = 1, which is the exact loop, the algorithm takes the one with the least J (T + G call_cost): tokens swept, and
    calls. The other blocks are swept whole, as often as the slowest of them needed.

    Args:
        report: Of the flow.
        tolerance: One that was measured: 1e-1, 1e-2, 1e-3, 1e-4.
        per_segment: Whether each segment gets the J that it needed itself.
        call_cost: Fixed cost of a network call, in tokens: about 32 for a batch of 1 on a CPU, more on a GPU, less for
            a larger batch.

    Returns:
        The strategy in the paper's notation, [Stack-GS-J-Else]; or Jacobi-J if no block is tough.

    Raises:
        ValueError: If CRM is not defined or the tolerance was not measured.

    Example:
        >>> report = jf.CalibrationReport.load(jf.find_report(jf.load("fashion-p2")))
        >>> gs_jacobi_notation(report)
        '[7-196-1-10]'
    """
    check_kind("report", report, CalibrationReport, "a CalibrationReport, as calibrate returns")
    tolerance, call_cost = check_number("tolerance", tolerance), check_number("call_cost", call_cost)
    check_flag("per_segment", per_segment)
    tough = report.tough_blocks
    needed = report.slowest_sweeps("noise", tolerance)
    others = max(1, *(count for block, count in enumerate(needed) if block not in tough))
    if not tough:
        return f"Jacobi-{others}"
    ways = [_cheapest_segments(report, block, tolerance, per_segment, call_cost) for block in tough]
    stack, segments, sweeps = ("/".join(map(str, column)) for column in (tough, *zip(*ways, strict=True)))
    return f"[{stack}-{segments}-{sweeps}-{others}]"


def _cheapest_segments(
    report: CalibrationReport, block: int, tolerance: float, per_segment: bool, call_cost: float
) -> tuple[int, str]:
    """GS and J of a tough block."""
    length = report.num_tokens
    ways = [(length * (1 + call_cost), length, "1")]
    for count, traces in report.segment_traces.get(block, {}).items():
        sweeps = [max(1, *trace.sweeps_to_tolerance(tolerance, length)) for trace in traces]
        if max(sweeps) <= length // count:
            total = sum(sweeps) if per_segment else count * max(sweeps)
            text = ",".join(map(str, sweeps)) if per_segment else str(max(sweeps))
            ways.append((total * (length / count + call_cost), count, text))
    return min(ways, key=lambda way: way[0])[1:]
