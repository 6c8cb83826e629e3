"""Calibration of a flow: the metrics of its blocks over images, and the sweeps that the blocks take."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from jacobiflow.calibration.convergence import ConvergenceCurve, gamma_norm, measure_distances
from jacobiflow.calibration.metrics import NORMS, Norm
from jacobiflow.calibration.report import (
    GUESS_NAMES,
    CalibrationReport,
    CalibrationSettings,
    LatentSource,
    guesses_by_name,
)
from jacobiflow.calibration.statistics import (
    BlockSolution,
    CalibrationStatistics,
    ImageMeans,
    ImageMetrics,
    Images,
    exact_solutions,
)
from jacobiflow.distributed import Processes
from jacobiflow.errors import InputTypeError, InputValueError
from jacobiflow.fixed_point import Segments
from jacobiflow.models.checkpoints.fingerprint import fingerprint
from jacobiflow.models.flow import Flow, check_flow
from jacobiflow.models.labels import ContextLike, Labels
from jacobiflow.models.latents import FIRST_CALIBRATION_LATENT, MAX_SAMPLES, draw_latents
from jacobiflow.utils.checks import check_choice, check_count, check_flag, check_path, check_seed
from jacobiflow.utils.files import MANIFEST, output_directory
from jacobiflow.utils.progress import Progress
from jacobiflow.utils.store import MeasurementStore

T = TypeVar("T")

# With fewer tokens in a segment the exact loop is faster.
_MIN_SEGMENT_TOKENS = 4
_CURVE_BATCH = 8  # samples that are swept together, until the slowest of them converges
_GAMMA = "gamma"  # Stands for the norm of the error matrix in place of a guess.
_GAMMA_SAMPLES = 8  # each sample costs some thirty backward passes for each block


def calibrate(
    flow: Flow,
    images: Images,
    labels: Labels | None = None,
    norm: Norm = 2,
    *,
    context: ContextLike | None = None,
    segments: int = 8,
    num_convergence_samples: int = 32,
    per_class: bool = False,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
    out: str | Path | None = None,
    processes: Processes | None = None,
) -> CalibrationReport:
    """Measures the paper's metrics of each block, and the sweeps that they predict.

    The metrics of a block are IGM = |g(X^(0)) - X*| for each guess (eq. 4 of the paper) and CRM = |Sigma^-1 X| |W_s| +
    |W_u| (eq. 5). They are norms of (T, C) matrices, which are means over the images. On fewer samples the distance to
    the solution is measured sweep by sweep, and the norm of the error matrix (Appendix A). Of a view under guidance
    (`flow.guided`) the metrics are those of the guided map at the images' own tokens, and sweeps start from fresh
    latents only.

    Args:
        flow: The model, or a view of it under guidance.
        images: (N, C, H, W), two or more, like those that the flow was trained on, with the same noise: a tensor, a
            NumPy array, or anything with a length that a tensor of indices can index.
        labels: (N,) their classes, or one class for all. `None`, or a label below 0, takes the unconditional row.
        context: In place of labels: what the flow takes, such as prompts.
        norm: Norm of `report.igm` and `report.crm`: 2, "fro" or 1. `report.metrics` has all three.
        segments: Number of segments of a tough block that have metrics of their own.
        num_convergence_samples: Number of samples whose sweeps are measured: images, evenly spaced, and as many fresh
            latents under the images' labels.
        per_class: Also measure the metrics over the images of each class alone (Appendix E).
        batch_size: Images in memory at a time.
        seed: Fixes the fresh latents. `jacobiflow.sample` never draws the same ones.
        progress: Is called after each step.
        out: File for the report. If a call is interrupted, the same call continues from the measurements in
            OUT.partial.
        processes: The processes that share the work, see `jacobiflow.processes`. Each of them calls this function.

    Raises:
        ValueError: If a fresh latent overflows in the exact inverse, or if another run calibrates to `out`.

    Example:
        >>> flow = jf.load("digits-p1")
        >>> images = jf.sample(flow, 4, seed=1, settings=None).images  # better 128 images like the training's
        >>> len(jf.calibrate(flow, images, num_convergence_samples=1).crm)
        4
    """
    check_flow(flow)
    norm = check_choice("norm", norm, NORMS)
    num_samples = check_count("num_convergence_samples", num_convergence_samples, maximum=MAX_SAMPLES)
    batch_size = check_count("batch_size", batch_size, maximum=MAX_SAMPLES)
    segments, seed = check_count("segments", segments), check_seed(seed)
    Segments(segments).check(flow.config.num_tokens)
    check_flag("per_class", per_class)
    _check_images(flow, images)
    if labels is None and per_class:
        raise InputValueError("per_class: give the labels of the images")
    checked = flow.check_one_context(labels, context, len(images))
    classes = sorted(set(checked.values.tolist())) if per_class and checked.values is not None else []
    settings = CalibrationSettings(
        len(images), checked.values is not None, norm, flow.guidance, segments, min(num_samples, len(images)), seed
    )
    processes = Processes() if processes is None else processes
    statistics = CalibrationStatistics(flow, images, checked, classes, batch_size, progress, processes)
    if out is None:
        return _make_report(statistics, settings, MeasurementStore())
    check_path("out", out)
    if (out := Path(out)).is_dir():
        raise InputValueError("is a folder; give a file", argument="out", value=out)
    folder = Path(f"{out}.partial")
    with ExitStack() as lock:

        def start() -> str:
            lock.enter_context(output_directory(folder, "calibration", ()))
            return _checksum(statistics, settings)

        store = MeasurementStore(folder, processes.run_on_rank_zero(start))
        processes.check_sees(folder / MANIFEST)
        report = _make_report(statistics, settings, store)
        if processes.rank == 0:
            report.save(out)
            with suppress(OSError):  # Windows removes no open file.
                store.remove()
    return report


def _check_images(flow: Flow, images: Images) -> None:
    if isinstance(images, torch.Tensor):
        flow.check_data(images, "images")
    try:
        num = len(images)
        images[torch.tensor([0, 0])]
    except (TypeError, LookupError) as error:
        kind = type(images).__name__
        raise InputTypeError(f"images of type {kind}: give a tensor, or what a tensor can index") from error
    if num < 2:
        raise InputValueError(f"images: {num} of them; give at least 2, better 128, to take means over")


def _checksum(statistics: CalibrationStatistics, settings: CalibrationSettings) -> str:
    """Returns a checksum of all that the measurements depend on."""
    digest = hashlib.sha256()
    for rows in torch.arange(settings.num_images).split(statistics.batch_size):
        digest.update(statistics.read(rows).cpu().numpy().tobytes())
    if statistics.context.values is not None:
        digest.update(statistics.context.values.cpu().numpy().tobytes())
    flow = statistics.flow
    others = (fingerprint(flow), flow.precision, settings, statistics.classes, statistics.batch_size)
    digest.update(repr(others).encode())
    return digest.hexdigest()


def _make_report(
    statistics: CalibrationStatistics, settings: CalibrationSettings, store: MeasurementStore
) -> CalibrationReport:
    """Measures what is not in the store, by all processes."""
    config = statistics.flow.config
    means = _measure_together(statistics, store, "means", ImageMeans, statistics.image_means)
    measure = partial(statistics.image_metrics, means, settings.segments, settings.norm)
    metrics = _measure_together(statistics, store, "metrics", ImageMetrics, measure)
    sweeps = _SweepMeasurement(statistics, settings, store, means, metrics)
    curves = sweeps.measure()
    blocks = range(config.num_blocks)
    return CalibrationReport(
        fingerprint=fingerprint(statistics.flow),
        num_tokens=config.num_tokens,
        token_channels=config.token_channels,
        settings=settings,
        metrics=metrics.metrics,
        segment_metrics=metrics.segment_metrics,
        class_metrics=metrics.class_metrics,
        mean_affine=means.mean_affine,
        curves={
            source: tuple({guess: curves[_Unit(i, source, guess)][0] for guess in GUESS_NAMES} for i in blocks)
            for source in sweeps.sources
        },
        segment_curves={
            i: {unit.num_segments: curves[unit] for unit in sweeps.segment_units(i)} for i in metrics.segment_metrics
        },
        gamma=tuple(curves[_Unit(i, sweeps.sources[0], _GAMMA)] for i in blocks),
    )


def _measure_together(
    statistics: CalibrationStatistics, store: MeasurementStore, name: str, declared: type[T], measure: Callable[[], T]
) -> T:
    """Returns what is stored, or measures it by all processes; the first one decides, and stores the result."""
    value = statistics.processes.run_on_rank_zero(partial(store.load, name, declared))
    if value is None:
        value = measure()
        statistics.processes.run_on_rank_zero(partial(store.save, name, value))
    return value


class _Unit(NamedTuple):
    """A measurement of one process: the curves of a block from a guess, or the norm of its error matrix."""

    block: int
    source: LatentSource
    guess: str
    num_segments: int = 1

    @property
    def name(self) -> str:
        """The name in the store."""
        suffix = _GAMMA if self.guess == _GAMMA else f"{self.source}-{self.guess}-{self.num_segments}"
        return f"block-{self.block}-{suffix}"


@dataclass
class _SweepMeasurement:
    """The part of a calibration that sweeps the blocks from each source of latents and each guess."""

    statistics: CalibrationStatistics
    settings: CalibrationSettings
    store: MeasurementStore
    means: ImageMeans
    metrics: ImageMetrics
    solutions: dict[LatentSource, list[BlockSolution]] = field(default_factory=dict)

    @property
    def sources(self) -> tuple[LatentSource, ...]:
        """The sources of the latents; under guidance images have no latents."""
        return ("noise",) if self.settings.guidance else ("images", "noise")

    def measure(self) -> dict[_Unit, Any]:
        """Measures the curves and the norms of the error matrices, by all processes.

        One process solves the fresh latents. Meanwhile the others measure what starts from images.
        """
        blocks = range(self.statistics.flow.config.num_blocks)
        curves = [_Unit(i, source, guess) for i in blocks for source in self.sources for guess in GUESS_NAMES]
        segments = [unit for i in self.metrics.segment_metrics for unit in self.segment_units(i)]
        units = dict.fromkeys([*(_Unit(i, self.sources[0], _GAMMA) for i in blocks), *curves, *segments])
        first = [unit for unit in units if unit.source == "images"]
        second = [unit for unit in units if unit.source == "noise"]
        progress = partial(self._measure_stored, [*first, *second])
        fresh, *values = self._share([self._fresh_solutions, *(partial(progress, unit) for unit in first)])
        device = self.statistics.flow.var.device
        self.solutions["noise"] = [solution.to(device) for solution in fresh]
        values += self._share([partial(progress, unit) for unit in second])
        return dict(zip([*first, *second], values, strict=True))

    def segment_units(self, i: int) -> list[_Unit]:
        """Returns the units of a tough block by number of segments, from fresh latents and the best guess by IGM."""
        best = self.metrics.metrics[self.settings.norm].best_guess(i)
        most = self.statistics.flow.config.num_tokens // _MIN_SEGMENT_TOKENS
        numbers = {1, self.settings.segments, *(2**k for k in range(1, most.bit_length()))}
        return [_Unit(i, "noise", best, number) for number in sorted(numbers)]

    def _share(self, work: Sequence[Callable[[], Any]]) -> list[Any]:
        return list(self.statistics.processes.map(lambda call: call(), work))

    def _fresh_solutions(self) -> list[BlockSolution]:
        """Solves the blocks at fresh latents, under the context of the images."""
        statistics, config = self.statistics, self.statistics.flow.config
        num, seed = self.settings.num_convergence_samples, self.settings.seed
        latents = draw_latents(num, config.num_tokens, config.token_channels, seed, FIRST_CALIBRATION_LATENT)
        context = statistics.context_at(self._index)
        solutions = exact_solutions(
            statistics.flow, latents, context, statistics.batch_size, statistics.progress, self.store
        )
        if statistics.processes.count == 1:
            return solutions
        return [solution.to(torch.device("cpu")) for solution in solutions]  # Processes send values of the CPU.

    @property
    def _index(self) -> Tensor:
        """The indices of the images whose sweeps are measured: evenly spaced."""
        num = self.settings.num_convergence_samples
        return torch.arange(num) * self.settings.num_images // num

    def _measure_stored(self, units: Sequence[_Unit], unit: _Unit) -> Any:
        """Returns what is stored of a unit, or measures it."""
        declared: Any = tuple[float, ...] if unit.guess == _GAMMA else tuple[ConvergenceCurve, ...]
        value = self.store.load_or_measure(unit.name, declared, partial(self._measure, unit))
        if self.statistics.progress is not None:
            self.statistics.progress(units.index(unit) + 1, len(units), "sweeps")
        return value

    def _measure(self, unit: _Unit) -> tuple[Any, ...]:
        """Measures the norm of a block's error matrix at the first solutions, or a curve for each of its segments."""
        if unit.source == "images" and "images" not in self.solutions:
            self.solutions["images"] = self.statistics.image_solutions(self._index)
        block = self.statistics.flow.inverse_block(unit.block)
        solution = self.solutions[unit.source][unit.block]
        size = self.statistics.batch_size
        if unit.guess == _GAMMA:
            samples = next(solution.split(_GAMMA_SAMPLES)).split(size)
            return tuple(torch.cat([gamma_norm(block, x, z, context) for x, z, context in samples]).tolist())
        guess = guesses_by_name(self.means.mean_affine[unit.block])[unit.guess]
        distances = [
            measure_distances(block, x, z, guess, context, unit.num_segments)
            for x, z, context in solution.split(min(size, _CURVE_BATCH))
        ]
        return tuple(map(ConvergenceCurve.from_distances, zip(*distances, strict=True)))
