"""What calibration found, as data with a JSON form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jacobiflow import codec
from jacobiflow.calibration.convergence import Trace
from jacobiflow.calibration.metrics import Components, Metrics, Norm, rank_correlation
from jacobiflow.calibration.tuning import Tuning
from jacobiflow.checks import check_choice, check_count, check_fields, check_number, check_path, check_seed
from jacobiflow.errors import InputValueError
from jacobiflow.files import write_json
from jacobiflow.flows.config import MOST_BLOCKS, MOST_CHANNELS, MOST_TOKENS
from jacobiflow.flows.fingerprint import check_fingerprint
from jacobiflow.flows.image_flow import ImageFlow, check_flow
from jacobiflow.guidance import Guidance
from jacobiflow.solvers import Guess, Latent, MeanAffine, Zeros

SCHEMA_VERSION = 2
GUESS_NAMES = ("latent", "zeros", "mean_affine")
Start = Literal["images", "noise"]


@dataclass(frozen=True)
class Settings:
    """What a calibration was made with; see `jacobiflow.calibrate`."""

    num_images: int
    labelled: bool
    norm: Norm
    guidance: Guidance | None
    segments: int
    traced: int
    seed: int

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("num_images", "segments", "traced"):
            check_count(name, getattr(self, name))
        check_seed(self.seed)


class Spread(NamedTuple):
    """Mean and standard deviation over classes."""

    mean: float
    std: float


@dataclass(frozen=True)
class ClassSpread:
    """How one block's metrics vary over classes (Appendix E of the paper, Tables 8 and 9).

    **Attributes:** `rank` of its CRM among the blocks (1 is the smallest) and its `percent`, or `None` where CRM is not
    defined; `igm` for each guess; `wins`, in how many classes each guess has the smallest IGM.
    """

    rank: Spread | None
    percent: Spread | None
    igm: Mapping[str, Spread]
    wins: Mapping[str, int]


@dataclass(frozen=True)
class Report:
    """What `jacobiflow.calibrate` measured of a flow. Blocks are numbered in encoding order.

    **Attributes:**

    - `fingerprint`: of the flow, see `check`; `num_tokens` T and `token_channels` C are its sizes.
    - `settings`: what it was made with.
    - `metrics`: IGM and CRM in each norm; `igm`, `crm`, `crm_percent`, `components` and `tough_blocks` are those in the
        norm of the settings.
    - `segment_metrics`: for each tough block, the metrics of its `settings.segments` segments.
    - `class_metrics`: per class of the images, the metrics over its images alone; empty unless asked for.
    - `mean_affine`: per block the calibrated guess.
    - `traces`: from "images" (the latents that encode them) and from "noise" (fresh latents), per block and guess the
        distance to the solution sweep by sweep. Under guidance from "noise" only.
    - `segment_traces`: for each tough block and each number of segments tried, a trace per segment: from fresh noise
        and the block's best guess, the segments before it being solved.
    - `gamma`: per block, the spectral norm of the error matrix at the solution of each of the first eight traced
        images, or under guidance of the first eight fresh latents.
    - `tuning`: what `jacobiflow.plan` needs, see `jacobiflow.calibration.tune`; `None` unless asked for.

    **Raises** `TypeError` for other kinds of values, `ValueError` where the parts do not fit each other: numbers of
    blocks, tokens, channels, segments and samples, the guesses, the tolerances, and what the settings name.
    """

    fingerprint: str
    num_tokens: int
    token_channels: int
    settings: Settings
    metrics: Mapping[Norm, Metrics]
    segment_metrics: Mapping[int, Metrics]
    class_metrics: Mapping[int, Metrics]
    mean_affine: tuple[MeanAffine, ...]
    traces: Mapping[Start, tuple[Mapping[str, Trace], ...]]
    segment_traces: Mapping[int, Mapping[int, tuple[Trace, ...]]]
    gamma: tuple[tuple[float, ...], ...]
    tuning: Tuning | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        wanted = len(self.mean_affine)
        check_count("blocks", wanted, most=MOST_BLOCKS)
        check_count("num_tokens", self.num_tokens, most=MOST_TOKENS)
        check_count("token_channels", self.token_channels, most=MOST_CHANNELS)
        of_blocks = [*self.metrics.values(), *self.class_metrics.values()]
        counts = [len(m.igm) for m in of_blocks] + [len(m.components) for m in of_blocks if m.components is not None]
        counts += [len(self.gamma), *map(len, self.traces.values())]
        if set(counts) != {wanted}:
            raise InputValueError(
                f"report of {wanted} blocks, but with parts of {sorted(set(counts) - {wanted})} blocks"
            )
        if self.settings.norm not in self.metrics or "noise" not in self.traces:
            raise InputValueError(
                f"report without metrics in norm {self.settings.norm!r}, or without sweeps from noise"
            )
        named = [row for m in (*of_blocks, *self.segment_metrics.values()) for row in m.igm]
        named += [row for rows in self.traces.values() for row in rows]  # type: ignore[misc]
        if any(set(row) != set(GUESS_NAMES) for row in named):
            raise InputValueError(f"report without one of the guesses {', '.join(GUESS_NAMES)}")
        if any(guess.shift.shape != (self.num_tokens, self.token_channels) for guess in self.mean_affine):
            raise InputValueError(f"report whose mean parameters are not ({self.num_tokens}, {self.token_channels})")
        cut = self.segment_metrics
        if not cut.keys() <= set(range(wanted)) or any(len(m.igm) != self.settings.segments for m in cut.values()):
            raise InputValueError(
                f"report whose segment_metrics are not of {self.settings.segments} segments of a block"
            )
        if any(not norms or min(norms) < 0 for norms in self.gamma):
            raise InputValueError("report whose gamma is not a norm for each sample of each block, 0 or positive")
        self._check_traces()
        if self.tuning is not None:
            if self.tuning.fingerprint != self.fingerprint:
                raise InputValueError("report with a tuning of another flow")
            self.tuning.check_sizes(wanted, self.num_tokens, self.token_channels)

    def _check_traces(self) -> None:
        segments = [(count, row) for rows in self.segment_traces.values() for count, row in rows.items()]
        if not all(0 <= block < self.num_blocks for block in self.segment_traces) or any(
            not 0 < count <= self.num_tokens or len(row) != count for count, row in segments
        ):
            raise InputValueError("report whose segment_traces are not a trace for each segment of a block")
        traces = [trace for rows in self.traces.values() for row in rows for trace in row.values()]
        traces += [trace for _, row in segments for trace in row]
        counts = [(each, trace.sweeps.keys()) for trace in traces for each in trace.sweeps.values()]
        if any(len(each) != self.settings.traced or measured != counts[0][1] for each, measured in counts):
            raise InputValueError(
                f"report whose traces are not of {self.settings.traced} samples to the same tolerances"
            )
        if any(count is not None and count > self.num_tokens for each, _ in counts for count in each):
            raise InputValueError(f"report with a sample of more sweeps than there are tokens, {self.num_tokens}")

    @property
    def num_blocks(self) -> int:
        """L."""
        return len(self.mean_affine)

    @property
    def igm(self) -> tuple[Mapping[str, float], ...]:
        """Per block, the IGM of each guess: "latent", "zeros", "mean_affine" (eq. 4, Table 1 of the paper)."""
        return self.metrics[self.settings.norm].igm

    @property
    def crm(self) -> tuple[float, ...]:
        """Per block, CRM (eq. 5, Table 2 of the paper). **Raises** `ValueError` where it is not defined."""
        return self.metrics[self.settings.norm].crm

    @property
    def crm_percent(self) -> tuple[float, ...]:
        """Per block, the share in the sum of CRM, in percent. **Raises** as `crm` does."""
        return self.metrics[self.settings.norm].crm_percent

    @property
    def components(self) -> tuple[Components, ...] | None:
        """Per block |Sigma^-1 X|, |W_s| and |W_u| (Table 6 of the paper); `None` where CRM is not defined."""
        return self.metrics[self.settings.norm].components

    @property
    def tough_blocks(self) -> tuple[int, ...]:
        """Blocks whose CRM dominates, see `jacobiflow.calibration.tough_blocks`. **Raises** as `crm` does."""
        return self.metrics[self.settings.norm].tough_blocks

    def best_guess(self, block: int) -> str:
        """The name of the guess with the smallest IGM in `block` (section 3.2 of the paper)."""
        block = check_count("block", block, 0, self.num_blocks - 1)
        return self.metrics[self.settings.norm].best_guess(block)

    def guess(self, block: int) -> Guess:
        """The guess that `best_guess` names."""
        return self.guesses(block)[self.best_guess(block)]

    def guesses(self, block: int) -> Mapping[str, Guess]:
        """The guesses of `block` by the names that `igm` uses. **Raises** where there is no such block."""
        block = check_count("block", block, 0, self.num_blocks - 1)
        return dict(zip(GUESS_NAMES, (Latent(), Zeros(), self.mean_affine[block]), strict=True))

    def mean_sweeps(self, start: Start, tolerance: float, guess: str | None = None) -> tuple[float, ...]:
        """Per block, the samples' mean number of plain sweeps to `tolerance`, from `guess` or the best one by IGM.

        A sample that rounding keeps above the tolerance counts T sweeps. **Raises** `ValueError` where that was not
        measured.
        """
        return tuple(float(np.mean(row)) for row in self._sweeps(start, tolerance, guess))

    def slowest_sweeps(self, start: Start, tolerance: float, guess: str | None = None) -> tuple[int, ...]:
        """As `mean_sweeps`, of the slowest sample."""
        return tuple(max(row) for row in self._sweeps(start, tolerance, guess))

    def _sweeps(self, start: Start, tolerance: float, guess: str | None) -> list[list[int]]:
        check_choice("start", start, ("images", "noise"))
        if start not in self.traces:
            raise InputValueError(f"sweeps from {start!r}: measured are those from {', '.join(self.traces)}")
        tolerance = check_number("tolerance", tolerance)
        if guess is not None:
            check_choice("guess", guess, GUESS_NAMES)
        counts = [row[guess or self.best_guess(block)].reach(tolerance) for block, row in enumerate(self.traces[start])]
        return [[self.num_tokens if count is None else count for count in row] for row in counts]

    def rank_correlation(
        self, metric: Literal["crm", "gamma"], start: Start = "noise", tolerance: float = 1e-3
    ) -> float:
        """How well a metric ranks the blocks: Spearman's correlation with `mean_sweeps`. NaN where one is constant.

        "gamma" is the mean over samples of the error matrix's spectral norm, of which CRM is a proxy (Appendix B of
        the paper). **Raises** as `crm` and `mean_sweeps` do.
        """
        check_choice("metric", metric, ("crm", "gamma"))
        values = self.crm if metric == "crm" else tuple(float(np.mean(norms)) for norms in self.gamma)
        return rank_correlation(values, self.mean_sweeps(start, tolerance))

    def class_spread(self) -> tuple[ClassSpread, ...]:
        """Per block, mean and (population) standard deviation of the metrics over classes.

        **Raises** `ValueError` where `calibrate` was not asked for them (`per_class`).
        """
        if not self.class_metrics:
            raise InputValueError("no metrics per class in this report: calibrate with per_class=True and labels")
        return tuple(_class_spread(list(self.class_metrics.values()), block) for block in range(self.num_blocks))

    def check(self, flow: ImageFlow) -> None:
        """**Raises** `ValueError` where the report is of another flow: other weights, not just another dtype."""
        check_flow(flow)
        check_fingerprint(self.fingerprint, flow, "the report is of")
        config = flow.config
        have = (self.num_blocks, self.num_tokens, self.token_channels)
        want = (config.num_blocks, config.num_tokens, config.token_channels)
        if have != want:
            raise InputValueError(
                f"report of blocks, tokens, channels {have}, but the flow has {want}: calibrate this one"
            )

    def to_json(self) -> dict[str, Any]:
        """A JSON value that `from_json` turns back into an equal report."""
        tuning = None if self.tuning is None else self.tuning.to_json()
        return {"schema_version": SCHEMA_VERSION, **codec.encode(self), "tuning": tuning}

    @classmethod
    def from_json(cls, value: Any) -> Report:
        """Inverse of `to_json`, and of its version 1. **Raises** `ValueError` that names the entry at fault."""
        version = value.get("schema_version") if isinstance(value, dict) else None
        if version not in (1, SCHEMA_VERSION):
            raise InputValueError(f"not a calibration report of schema_version {SCHEMA_VERSION}")
        tuning = value.get("tuning")
        entries = {name: entry for name, entry in value.items() if name not in ("schema_version", "tuning")}
        if version == 1:
            try:  # it has segment_metrics of every block
                cut = {block: entries["segment_metrics"][int(block)] for block in entries["segment_traces"]}
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise InputValueError(
                    f"report of schema_version 1: an entry is missing or of the wrong kind ({error})"
                ) from error
            entries["segment_metrics"] = cut
        found: Report = codec.decode(cls, entries)
        return replace(found, tuning=None if tuning is None else Tuning.from_json(tuning))

    def save(self, path: str | Path) -> None:
        """Write as JSON, on one line; the file appears whole or not at all."""
        check_path("path", path)
        write_json(path, self.to_json(), indent=None)

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read what `save` wrote. **Raises** `ValueError` where the file is missing or not a report."""
        return codec.load(path, "report", cls.from_json, remedy="; make it anew with jacobiflow calibrate")


def _class_spread(classes: Sequence[Metrics], block: int) -> ClassSpread:
    def spread(value: Callable[[Metrics], float]) -> Spread:
        values = [value(metrics) for metrics in classes]
        with np.errstate(invalid="ignore"):  # of an infinity there is no standard deviation: NaN
            return Spread(float(np.mean(values)), float(np.std(values)))

    defined = classes[0].components is not None
    names = list(classes[0].igm[block])
    best = [metrics.best_guess(block) for metrics in classes]
    return ClassSpread(
        rank=spread(lambda m: 1 + sum(crm < m.crm[block] for crm in m.crm)) if defined else None,
        percent=spread(lambda m: m.crm_percent[block]) if defined else None,
        igm={name: spread(lambda m, name=name: m.igm[block][name]) for name in names},  # type: ignore[misc]
        wins={name: best.count(name) for name in names},
    )
