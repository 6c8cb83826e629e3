"""`calibrate`: the metrics of a flow over images, and the sweeps that its blocks take."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from jacobiflow.calibration.convergence import ConvergenceCurve, distances, gamma_norm
from jacobiflow.calibration.metrics import NORMS, Norm
from jacobiflow.calibration.report import CalibrationReport, Settings, Start, named_guesses
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
from jacobiflow.utils import serialization
from jacobiflow.utils.checks import check_choice, check_count, check_flag, check_path, check_seed
from jacobiflow.utils.files import LOCK, MANIFEST, output_directory, read_object, remove_partials, write_json
from jacobiflow.utils.progress import Progress

T = TypeVar("T")

_FEWEST_TOKENS = 4  # in a segment: with fewer, the exact loop is the better plan
_SWEPT_TOGETHER = 8  # samples of a trace, which are swept until the slowest of them has settled
_GAMMA_SAMPLES = 8  # each costs some thirty backward passes a block


def calibrate(
    flow: Flow,
    images: Images,
    labels: Labels | None = None,
    norm: Norm = 2,
    *,
    context: ContextLike | None = None,
    segments: int = 8,
    traced: int = 32,
    per_class: bool = False,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
    out: str | Path | None = None,
) -> CalibrationReport:
    """Measures the paper's metrics of each block, and the sweeps that they predict.

    Per block, over the images: IGM = |g(X^(0)) - X*| for each guess (eq. 4 of the paper) and CRM = |Sigma^-1 X| |W_s| +
    |W_u| (eq. 5), norms of (T, C) matrices that are means over the images. On `traced` samples: the distance to the
    solution sweep by sweep, and the norm of the error matrix (Appendix A). Of a view under guidance (`flow.guided`) the
    metrics are those of the guided map at the images' own tokens, and sweeps are measured from fresh noise only.

    Args:
        flow: The model, or a view of it under guidance.
        images: (N, C, H, W), two or more, like those that the flow was trained on, with the same noise: a tensor, a
            NumPy array, or anything with a length that a tensor of indices can index.
        labels: (N,) their classes, or one class for all. `None`, or a label below 0, takes the unconditional row.
        context: In place of labels: what the flow takes, such as prompts.
        norm: That of `report.igm` and `report.crm`: 2, "fro" or 1. `report.metrics` has all three.
        segments: Number of segments of a tough block that have metrics of their own.
        traced: Number of images, evenly spaced, and of fresh latents under their labels whose sweeps are measured.
        per_class: Also measure the metrics over the images of each class alone (Appendix E).
        batch_size: Images in memory at a time.
        seed: Fixes the fresh latents. `jacobiflow.sample` never draws the same ones.
        progress: Is called after each step.
        out: File for the report. The same call goes on after an interruption, from the finished measurements in
            OUT.partial.

    Raises:
        ValueError: If a fresh latent overflows in the exact inverse, or if another process calibrates to `out`.

    Example:
        >>> flow = jf.load("digits-p1")
        >>> images = jf.sample(flow, 4, seed=1, settings=None).images  # better 128 images like the training's
        >>> len(jf.calibrate(flow, images, traced=1).crm)
        4
    """
    check_flow(flow)
    norm = check_choice("norm", norm, NORMS)
    traced = check_count("traced", traced, most=MAX_SAMPLES)
    batch_size = check_count("batch_size", batch_size, most=MAX_SAMPLES)
    segments, seed = check_count("segments", segments), check_seed(seed)
    Segments(segments).check(flow.config.num_tokens)
    check_flag("per_class", per_class)
    _check_images(flow, images)
    if labels is None and per_class:
        raise InputValueError("per_class: give the labels of the images")
    checked = flow.check_one_context(labels, context, len(images))
    classes = sorted(set(checked.values.tolist())) if per_class and checked.values is not None else []
    settings = Settings(
        len(images), checked.values is not None, norm, flow.guidance, segments, min(traced, len(images)), seed
    )
    passes = CalibrationStatistics(flow, images, checked, batch_size, progress)
    if out is None:
        return _measure(passes, settings, classes, _Parts())
    check_path("out", out)
    if (out := Path(out)).is_dir():
        raise InputValueError(f"out={str(out)!r}: is a folder; give a file")
    folder, key = Path(f"{out}.partial"), _key(passes, settings, classes)
    with output_directory(folder, "calibration", ()):
        report = _measure(passes, settings, classes, _Parts(folder, key))
        report.save(out)
        with suppress(OSError):  # Windows removes no open file
            _remove_parts(folder)
    return report


def _remove_parts(folder: Path) -> None:
    """Removes the parts of calibrations, and their folder if it has no files of others."""
    remove_partials(folder)
    for file in folder.glob("*.json"):
        if (read_object(file) or {}).keys() == {"key", "part"}:
            file.unlink()
    if {entry.name for entry in folder.iterdir()} == {LOCK, MANIFEST}:
        (folder / MANIFEST).unlink()
        (folder / LOCK).unlink()
        folder.rmdir()


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


@dataclass(frozen=True)
class _Parts:
    """The measurements of a calibration, kept in a folder under the key of the run; without a folder none is kept."""

    folder: Path | None = None
    key: str = ""

    def __call__(self, name: str, declared: type[T], measure: Callable[[], T]) -> T:
        """Returns the part with a name: that of an interrupted run with the same key, or else a new one."""
        if self.folder is None:
            return measure()
        file = self.folder / f"{name}.json"
        stored = read_object(file) or {}
        if stored.get("key") == self.key:
            with suppress(ValueError):  # damaged, or of another version: measured again
                return serialization.decode(declared, stored["part"])
        value = measure()
        write_json(file, {"key": self.key, "part": serialization.encode(value)}, indent=None)
        return value


class _BlockSweeps(NamedTuple):
    """The parts of a report that come from the sweeps of one block; see `CalibrationReport`."""

    traces: Mapping[Start, Mapping[str, ConvergenceCurve]]
    segment_traces: Mapping[int, tuple[ConvergenceCurve, ...]]
    gamma: tuple[float, ...]


def _measure(
    passes: CalibrationStatistics, settings: Settings, classes: Sequence[int], part: _Parts
) -> CalibrationReport:
    """Measures the parts that are not kept."""
    config = passes.flow.config
    means = part("means", ImageMeans, partial(passes.means, classes))
    measure = partial(passes.metrics, means, classes, settings.segments, settings.norm)
    measured = part("metrics", ImageMetrics, measure)

    @functools.cache
    def solutions() -> dict[Start, list[BlockSolution]]:
        """Of evenly spaced images and of fresh latents. Only sweeps that are not kept need them."""
        indices = torch.arange(settings.traced) * settings.num_images // settings.traced
        latents = draw_latents(
            settings.traced, config.num_tokens, config.token_channels, settings.seed, FIRST_CALIBRATION_LATENT
        )
        found: dict[Start, list[BlockSolution]] = {} if settings.guidance else {"images": passes.encoded(indices)}
        found["noise"] = exact_solutions(
            passes.flow, latents, passes.context_at(indices), passes.batch_size, passes.progress,
            lambda i, solve: part(f"exact-{i}", torch.Tensor, solve),
        )  # fmt: skip
        return found

    blocks = [_sweep(passes, settings, means, measured, solutions, part, i) for i in range(config.num_blocks)]
    return CalibrationReport(
        fingerprint=fingerprint(passes.flow),
        num_tokens=config.num_tokens,
        token_channels=config.token_channels,
        settings=settings,
        metrics=measured.metrics,
        segment_metrics=measured.segment_metrics,
        class_metrics=measured.class_metrics,
        mean_affine=means.mean_affine,
        traces={start: tuple(block.traces[start] for block in blocks) for start in blocks[0].traces},
        segment_traces={i: blocks[i].segment_traces for i in measured.segment_metrics},
        gamma=tuple(block.gamma for block in blocks),
    )


def _sweep(
    passes: CalibrationStatistics, settings: Settings, means: ImageMeans, measured: ImageMetrics,
    solutions: Callable[[], Mapping[Start, Sequence[BlockSolution]]], part: _Parts, i: int,
) -> _BlockSweeps:  # fmt: skip
    """Traces of block `i` from each start and guess; of a tough one in segments too, from noise and the best guess."""
    block, num_tokens = passes.blocks[i], passes.flow.config.num_tokens
    guesses, best = named_guesses(means.mean_affine[i]), measured.metrics[settings.norm].best_guess(i)
    starts: tuple[Start, ...] = ("noise",) if settings.guidance else ("images", "noise")

    def traces(start: Start, guess: str, count: int = 1) -> tuple[ConvergenceCurve, ...]:
        def measure() -> tuple[ConvergenceCurve, ...]:
            curves = [
                distances(block, x, z, guesses[guess], context, count)
                for x, z, context in solutions()[start][i].split(min(passes.batch_size, _SWEPT_TOGETHER))
            ]
            return tuple(map(ConvergenceCurve.of, zip(*curves, strict=True)))

        return part(f"block-{i}-{start}-{guess}-{count}", tuple[ConvergenceCurve, ...], measure)

    def gamma() -> tuple[float, ...]:
        few = next(solutions()[starts[0]][i].split(_GAMMA_SAMPLES)).split(passes.batch_size)
        return tuple(torch.cat([gamma_norm(block, x, z, context) for x, z, context in few]).tolist())

    whole = {start: {name: traces(start, name)[0] for name in guesses} for start in starts}
    segments: dict[int, tuple[ConvergenceCurve, ...]] = {1: (whole["noise"][best],)}
    if i in measured.segment_metrics:
        powers = {2**k for k in range(num_tokens.bit_length()) if 2**k <= num_tokens // _FEWEST_TOKENS}
        segments |= {count: traces("noise", best, count) for count in sorted(({settings.segments} | powers) - {1})}
    sweeps = _BlockSweeps(whole, segments, part(f"block-{i}-gamma", tuple[float, ...], gamma))
    if passes.progress is not None:
        passes.progress(i + 1, len(passes.blocks), "sweeps")
    return sweeps


def _key(passes: CalibrationStatistics, settings: Settings, classes: Sequence[int]) -> str:
    """A checksum of all that the measurements depend on."""
    digest = hashlib.sha256()
    for rows in torch.arange(settings.num_images).split(passes.batch_size):
        digest.update(passes.read(rows).cpu().numpy().tobytes())
    if passes.context.values is not None:
        digest.update(passes.context.values.cpu().numpy().tobytes())
    others = (fingerprint(passes.flow), passes.flow.precision, settings, classes, passes.batch_size)
    digest.update(repr(others).encode())
    return digest.hexdigest()
