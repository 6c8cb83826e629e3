"""Calibration of a flow: the metrics of its blocks over images, and the sweeps that the blocks take."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

from jacobiflow.calibration.convergence import ConvergenceCurve, gamma_norm, measure_distances
from jacobiflow.calibration.metrics import NORMS, Norm
from jacobiflow.calibration.report import CalibrationReport, CalibrationSettings, LatentSource, guesses_by_name
from jacobiflow.calibration.statistics import (
    BlockSolution,
    CalibrationStatistics,
    ImageMeans,
    ImageMetrics,
    Images,
    exact_solutions,
)
from jacobiflow.errors import InputTypeError, InputValueError
from jacobiflow.fixed_point import Segments
from jacobiflow.models.checkpoints.fingerprint import fingerprint
from jacobiflow.models.flow import Flow, check_flow
from jacobiflow.models.labels import ContextLike, Labels
from jacobiflow.models.latents import FIRST_CALIBRATION_LATENT, MAX_SAMPLES, draw_latents
from jacobiflow.utils.checks import check_choice, check_count, check_flag, check_path, check_seed
from jacobiflow.utils.files import output_directory
from jacobiflow.utils.progress import Progress
from jacobiflow.utils.store import MeasurementStore

CurvesBySource = Mapping[LatentSource, Mapping[str, ConvergenceCurve]]  # and by guess

# With fewer tokens in a segment the exact loop is faster.
_MIN_SEGMENT_TOKENS = 4
_CURVE_BATCH = 8  # samples that are swept together, until the slowest of them converges
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

    Raises:
        ValueError: If a fresh latent overflows in the exact inverse, or if another process calibrates to `out`.

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
    statistics = CalibrationStatistics(flow, images, checked, classes, batch_size, progress)
    if out is None:
        return _make_report(statistics, settings, MeasurementStore())
    check_path("out", out)
    if (out := Path(out)).is_dir():
        raise InputValueError(f"out={str(out)!r}: is a folder; give a file")
    folder = Path(f"{out}.partial")
    store = MeasurementStore(folder, _checksum(statistics, settings))
    with output_directory(folder, "calibration", ()):
        report = _make_report(statistics, settings, store)
        report.save(out)
        with suppress(OSError):  # Windows removes no open file
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
    """Measures what is not in the store."""
    config = statistics.flow.config
    means = store.load_or_measure("means", ImageMeans, statistics.image_means)
    measure = partial(statistics.image_metrics, means, settings.segments, settings.norm)
    metrics = store.load_or_measure("metrics", ImageMetrics, measure)
    sweeps = _SweepMeasurement(statistics, settings, store, means, metrics)
    curves: list[CurvesBySource] = []
    segment_curves: dict[int, dict[int, tuple[ConvergenceCurve, ...]]] = {}
    gamma: list[tuple[float, ...]] = []
    for i in range(config.num_blocks):
        curves.append(sweeps.whole_block(i))
        if i in metrics.segment_metrics:
            segment_curves[i] = sweeps.segments(i, curves[i])
        gamma.append(store.load_or_measure(f"block-{i}-gamma", tuple[float, ...], partial(sweeps.gamma, i)))
        if statistics.progress is not None:
            statistics.progress(i + 1, config.num_blocks, "sweeps")
    return CalibrationReport(
        fingerprint=fingerprint(statistics.flow),
        num_tokens=config.num_tokens,
        token_channels=config.token_channels,
        settings=settings,
        metrics=metrics.metrics,
        segment_metrics=metrics.segment_metrics,
        class_metrics=metrics.class_metrics,
        mean_affine=means.mean_affine,
        curves={source: tuple(block[source] for block in curves) for source in sweeps.sources},
        segment_curves=segment_curves,
        gamma=tuple(gamma),
    )


@dataclass
class _SweepMeasurement:
    """The part of a calibration that sweeps the blocks from each source of latents and each guess."""

    statistics: CalibrationStatistics
    settings: CalibrationSettings
    store: MeasurementStore
    means: ImageMeans
    metrics: ImageMetrics

    @property
    def sources(self) -> tuple[LatentSource, ...]:
        """The sources of the latents; under guidance images have no latents."""
        return ("noise",) if self.settings.guidance else ("images", "noise")

    @cached_property
    def solutions(self) -> dict[LatentSource, list[BlockSolution]]:
        """Per source and block, the solutions at its latents. They are computed only if a curve is not stored."""
        statistics, settings, config = self.statistics, self.settings, self.statistics.flow.config
        num = settings.num_convergence_samples
        index = torch.arange(num) * settings.num_images // num
        latents = draw_latents(num, config.num_tokens, config.token_channels, settings.seed, FIRST_CALIBRATION_LATENT)
        solutions: dict[LatentSource, list[BlockSolution]] = {}
        if "images" in self.sources:
            solutions["images"] = statistics.image_solutions(index)
        context = statistics.context_at(index)
        solutions["noise"] = exact_solutions(
            statistics.flow, latents, context, statistics.batch_size, statistics.progress, self.store
        )
        return solutions

    def whole_block(self, i: int) -> CurvesBySource:
        """Returns the curves of block `i` from each source and guess."""
        guesses = guesses_by_name(self.means.mean_affine[i])
        return {source: {guess: self._curves(i, source, guess, 1)[0] for guess in guesses} for source in self.sources}

    def segments(self, i: int, whole: CurvesBySource) -> dict[int, tuple[ConvergenceCurve, ...]]:
        """Returns the curves of a tough block by number of segments, from fresh latents and the best guess by IGM."""
        best = self.metrics.metrics[self.settings.norm].best_guess(i)
        most = self.statistics.flow.config.num_tokens // _MIN_SEGMENT_TOKENS
        numbers = {self.settings.segments, *(2**k for k in range(1, most.bit_length()))} - {1}
        curves = {1: (whole["noise"][best],)}
        return curves | {number: self._curves(i, "noise", best, number) for number in sorted(numbers)}

    def gamma(self, i: int) -> tuple[float, ...]:
        """Measures the norm of block `i`'s error matrix at the first solutions."""
        samples = next(self.solutions[self.sources[0]][i].split(_GAMMA_SAMPLES)).split(self.statistics.batch_size)
        block = self.statistics.blocks[i]
        return tuple(torch.cat([gamma_norm(block, x, z, context) for x, z, context in samples]).tolist())

    def _curves(self, i: int, source: LatentSource, guess: str, num_segments: int) -> tuple[ConvergenceCurve, ...]:
        """Returns a curve for each segment of block `i`."""
        measure = partial(self._measure_curves, i, source, guess, num_segments)
        name = f"block-{i}-{source}-{guess}-{num_segments}"
        return self.store.load_or_measure(name, tuple[ConvergenceCurve, ...], measure)

    def _measure_curves(
        self, i: int, source: LatentSource, guess_name: str, num_segments: int
    ) -> tuple[ConvergenceCurve, ...]:
        block, guess = self.statistics.blocks[i], guesses_by_name(self.means.mean_affine[i])[guess_name]
        distances = [
            measure_distances(block, x, z, guess, context, num_segments)
            for x, z, context in self.solutions[source][i].split(min(self.statistics.batch_size, _CURVE_BATCH))
        ]
        return tuple(map(ConvergenceCurve.from_distances, zip(*distances, strict=True)))
