"""`calibrate`: the metrics of a flow over images, and the sweeps that its blocks take."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from jacobiflow import codec
from jacobiflow.calibration.convergence import Trace
from jacobiflow.calibration.metrics import NORMS, Metrics, Norm
from jacobiflow.calibration.passes import BlockSolution, Images, Passes
from jacobiflow.calibration.report import GUESS_NAMES, Report, Settings, Start
from jacobiflow.checks import check_choice, check_count, check_flag, check_path, check_seed
from jacobiflow.errors import InputTypeError, InputValueError
from jacobiflow.files import read_object, write_json
from jacobiflow.flows.fingerprint import fingerprint
from jacobiflow.flows.image_flow import ImageFlow, check_flow, precision
from jacobiflow.flows.labels import Labels
from jacobiflow.latents import MOST_SAMPLES
from jacobiflow.locking import LOCK, locked
from jacobiflow.progress import Progress
from jacobiflow.solvers import Guess, Latent, MeanAffine, Segments, Zeros

T = TypeVar("T")
Parts = Callable[[str, Any, Callable[[], Any]], Any]
"""Returns the part of a calibration with a name: that of an interrupted run, or else a new one."""

_FEWEST_TOKENS = 4  # in a segment: with fewer, the exact loop is the better plan
_SETTINGS = "settings.json"


def calibrate(
    flow: ImageFlow,
    images: Images,
    labels: Labels | None = None,
    norm: Norm = 2,
    *,
    segments: int = 8,
    traced: int = 32,
    per_class: bool = False,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
    out: str | Path | None = None,
) -> Report:
    """Measures the paper's metrics of each block, and the sweeps that they predict.

    Per block, over the images: IGM = |g(X^(0)) - X*| for each guess (eq. 4 of the paper) and CRM = |Sigma^-1 X| |W_s| +
    |W_u| (eq. 5), norms of (T, C) matrices that are means over the images. On `traced` samples: the distance to the
    solution sweep by sweep, and the norm of the error matrix (Appendix A).

    Args:
        flow: The model. Of a view under guidance (`flow.guided`) the metrics are those of the guided map, at the
            images' own tokens; sweeps are then measured from fresh noise only.
        images: (N, C, H, W), two or more, like those that the flow was trained on, with the same noise: a tensor, a
            NumPy array, or anything with a length that a tensor of indices can index.
        labels: (N,) their classes, as a tensor, a list or an array, or one class for all. `None`, or a label below 0,
            takes the unconditional row.
        norm: That of `report.igm` and `report.crm`: 2, "fro" or 1. `report.metrics` has all three.
        segments: Number of segments of a tough block that have metrics of their own.
        traced: Samples whose sweeps are measured: as many of the images, evenly spaced, and as many fresh latents under
            their labels.
        per_class: Also measure the metrics over the images of each class alone (Appendix E).
        batch_size: Images in memory at a time.
        seed: Fixes the fresh latents. `jacobiflow.sample` never draws the same ones.
        progress: Is called after each step.
        out: Write the report to this file. Until then the finished parts are in the folder OUT.partial, from which the
            same call goes on after an interruption.

    Returns:
        A `Report`.

    Raises:
        ValueError: If images, labels or settings do not fit the flow, if a fresh latent overflows in the exact inverse,
            or if another process calibrates to `out`.

    Example:
        >>> flow = jf.load("digits-p1")
        >>> images = jf.sample(flow, 4, seed=1).images  # better 128 images like the training's
        >>> report = jf.calibrate(flow, images, traced=1)
        >>> len(report.crm)
        4
    """
    check_flow(flow)
    norm = check_choice("norm", norm, NORMS)
    traced = check_count("traced", traced, most=MOST_SAMPLES)
    batch_size = check_count("batch_size", batch_size, most=MOST_SAMPLES)
    segments, seed = check_count("segments", segments), check_seed(seed)
    Segments(segments).check(flow.config.num_tokens)
    check_flag("per_class", per_class)
    classes = _checked_classes(flow, images, labels, per_class)
    if out is not None:
        check_path("out", out)
    settings = Settings(len(images), labels is not None, norm, flow.guidance, segments, min(traced, len(images)), seed)
    passes = Passes(flow, flow.inverse_blocks, images, classes, batch_size, progress)
    if out is None:
        return _measure(passes, settings, per_class, lambda name, declared, make: make())
    with _parts_beside(Path(out), partial(_key, passes, settings, per_class)) as parts:
        report = _measure(passes, settings, per_class, parts)
        report.save(out)
    return report


def _checked_classes(
    flow: ImageFlow, images: Images, labels: Labels | None, per_class: bool
) -> Int[Tensor, " n"] | None:
    if isinstance(images, Tensor):
        flow.check_images(images)
    indexable = hasattr(images, "__getitem__") and hasattr(images, "__len__")
    if not indexable or isinstance(images, str | bytes | Mapping) or getattr(images, "shape", None) == ():
        raise InputTypeError(f"images of type {type(images).__name__}: give a tensor, or what a tensor can index")
    if len(images) < 2:
        raise InputValueError(f"images: {len(images)} of them; give at least 2, better 128, to take means over")
    if labels is None and per_class:
        raise InputValueError("per_class: give the labels of the images")
    return None if labels is None else flow.check_labels(labels, len(images))


def _measure(passes: Passes, settings: Settings, per_class: bool, parts: Parts) -> Report:
    flow, labels, norm, segments = passes.flow, passes.labels, settings.norm, settings.segments
    classes = sorted(set(labels.tolist())) if per_class and labels is not None else ()

    def measure_metrics() -> _MetricsPart:
        mean_affine, means = passes.parameters(classes)
        return tuple(mean_affine), *passes.metrics(means, list(map(_guesses, mean_affine)), segments, norm)

    mean_affine, metrics, segment_metrics, class_metrics = parts("metrics", _MetricsPart, measure_metrics)
    guesses = list(map(_guesses, mean_affine))
    traced = torch.arange(settings.traced) * settings.num_images // settings.traced  # evenly spaced
    solutions: dict[Start, list[BlockSolution]] = {} if settings.guidance else {"images": passes.encoded(traced)}
    solutions["noise"] = passes.sampled(traced, settings.seed)
    traces: dict[Start, tuple[Mapping[str, Trace], ...]] = {
        start: tuple(
            parts(f"{start}-{i}", _TracePart, partial(_traces, passes, i, rows[i], guesses[i], start))
            for i in range(len(rows))
        )
        for start, rows in solutions.items()
    }
    at = solutions["noise" if settings.guidance else "images"]
    return Report(
        fingerprint=fingerprint(flow),
        num_tokens=flow.config.num_tokens,
        token_channels=flow.config.token_channels,
        settings=settings,
        metrics=metrics,
        segment_metrics=segment_metrics,
        class_metrics=class_metrics,
        mean_affine=mean_affine,
        traces=traces,
        segment_traces={
            i: parts(
                f"segments-{i}", _SegmentsPart,
                partial(_segment_traces, passes, i, solutions["noise"][i], guesses[i], metrics[norm], segments, traces),
            )
            for i in segment_metrics
        },
        gamma=tuple(
            parts(f"gamma-{i}", tuple[float, ...], partial(_gamma, passes, i, at[i])) for i in range(len(flow.blocks))
        ),
    )  # fmt: skip


_MetricsPart = tuple[tuple[MeanAffine, ...], Mapping[Norm, Metrics], Mapping[int, Metrics], Mapping[int, Metrics]]
_TracePart = Mapping[str, Trace]
_SegmentsPart = Mapping[int, tuple[Trace, ...]]


def _guesses(mean_affine: MeanAffine) -> dict[str, Guess]:
    return dict(zip(GUESS_NAMES, (Latent(), Zeros(), mean_affine), strict=True))


def _traces(passes: Passes, i: int, at: BlockSolution, guesses: Mapping[str, Guess], start: str) -> _TracePart:
    """For each guess, how sweeps of all tokens converge."""
    _note(passes, i, f"sweeps from {start}")
    return {name: passes.traces(i, at, guess, 1)[0] for name, guess in guesses.items()}


def _segment_traces(
    passes: Passes, i: int, at: BlockSolution, guesses: Mapping[str, Guess], metrics: Metrics, segments: int,
    traces: Mapping[Start, Sequence[Mapping[str, Trace]]],
) -> _SegmentsPart:  # fmt: skip
    """For each number of segments, how each of them converges from the block's best guess."""
    _note(passes, i, "segments")
    length, best = passes.flow.config.num_tokens, metrics.best_guess(i)
    powers = {2**k for k in range(length.bit_length()) if 2**k <= length // _FEWEST_TOKENS}
    segmented = {count: passes.traces(i, at, guesses[best], count) for count in sorted(({segments} | powers) - {1})}
    return {1: (traces["noise"][i][best],), **segmented}


def _gamma(passes: Passes, i: int, at: BlockSolution) -> tuple[float, ...]:
    _note(passes, i, "error matrix")
    return passes.gamma(i, at)


def _note(passes: Passes, i: int, what: str) -> None:
    if passes.progress is not None:
        passes.progress(i, len(passes.blocks), what)


# ------------------------------------------------------------------------------------------------- interrupted runs


@contextmanager
def _parts_beside(out: Path, key: Callable[[], str]) -> Iterator[Parts]:
    """The finished parts of the calibration with this key, in OUT.partial until the report is written.

    Raises ValueError if another process calibrates to `out`, or if the folder holds other things.
    """
    folder = out.with_name(f"{out.name}.partial")
    with locked(folder):
        settings = {"calibration": key()}
        names = {entry.name for entry in folder.iterdir()} - {LOCK}
        if names and set(read_object(folder / _SETTINGS) or ()) != {"calibration"}:
            raise InputValueError(f"{folder}: was not made by a calibration; move it away, or give another file")
        if read_object(folder / _SETTINGS) != settings:
            for name in names:
                (folder / name).unlink()
            write_json(folder / _SETTINGS, settings)

        def part(name: str, declared: Any, make: Callable[[], T]) -> T:
            file = folder / f"{name}.json"
            with suppress(ValueError):  # missing, or damaged: measured again
                return codec.load(file, name, lambda value: codec.decode(declared, value))
            value = make()
            write_json(file, codec.encode(value), indent=None)
            return value

        yield part
        for file in (*folder.glob("*.json"), folder / LOCK):
            file.unlink()
        with suppress(OSError):  # something else is in it
            folder.rmdir()


def _key(passes: Passes, settings: Settings, per_class: bool) -> str:
    """A checksum of all that the measurements depend on."""
    digest = hashlib.sha256()
    for rows in torch.arange(settings.num_images).split(passes.batch_size):
        digest.update(passes.read(rows).cpu().numpy().tobytes())
    labels = None if passes.labels is None else passes.labels.tolist()
    others = (fingerprint(passes.flow), precision(passes.flow), labels, settings, per_class, passes.batch_size)
    digest.update(repr(others).encode())
    return digest.hexdigest()
