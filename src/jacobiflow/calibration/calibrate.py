"""`calibrate`: the metrics of a flow over images, and the sweeps that its blocks take."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Int
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from jacobiflow.calibration.convergence import Trace
from jacobiflow.calibration.kept import keeping
from jacobiflow.calibration.metrics import NORMS, Metrics, Norm
from jacobiflow.calibration.passes import BlockSolution, Images, Passes
from jacobiflow.calibration.report import GUESS_NAMES, Report, Settings, Start
from jacobiflow.calibration.tune import SAMPLES, tune
from jacobiflow.checks import check_choice, check_count, check_flag, check_path, check_seed
from jacobiflow.errors import InputTypeError, InputValueError
from jacobiflow.flows.fingerprint import fingerprint
from jacobiflow.flows.image_flow import ImageFlow, check_flow
from jacobiflow.flows.labels import Labels
from jacobiflow.flows.precision import precision
from jacobiflow.guidance import Guidance, check_guidance, guided
from jacobiflow.latents import MOST_SAMPLES
from jacobiflow.solvers import Guess, Latent, MeanAffine, Segments, Zeros

_FEWEST_TOKENS = 4  # in a segment: with fewer, the sequential loop is the better plan


def calibrate(
    flow: ImageFlow,
    images: Images,
    labels: Labels | None = None,
    norm: Norm = 2,
    guidance: Guidance | None = None,
    *,
    segments: int = 8,
    traced: int = 32,
    per_class: bool = False,
    chord: bool = False,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
    out: str | Path | None = None,
) -> Report:
    """Measure which blocks of `flow` are tough, where to start in each, and how long to sweep.

    Per block, over the images: IGM = |g(X^(0)) - X*| for each guess (eq. 4 of the paper) and CRM = |Sigma^-1 X| |W_s| +
    |W_u| (eq. 5), norms of (T, C) matrices that are means over the images. And what these predict, measured on `traced`
    samples: the distance to the solution sweep by sweep, and the norm of the error matrix (Appendix A).

    **Arguments:**

    - `images`: (N, C, H, W), two or more, like those that the flow was trained on, with the same noise: a tensor, a
        NumPy array, or anything with a length that a tensor of indices can index. `batch_size` are read at a time.
    - `labels`: (N,) their classes, as a tensor, a list or an array, or one class for all; `None`, or a label below 0,
        takes the unconditional row.
    - `norm`: that of `report.igm` and `report.crm`: 2, "fro" or 1. `report.metrics` has all three.
    - `guidance`: the guidance to sample with. The map, its parameters and so the metrics are then the guided ones, at
        the images' own tokens; sweeps are measured from fresh noise only.
    - `segments`: how many segments a tough block is cut into for the metrics per segment.
    - `traced`: samples whose sweeps are measured: as many of the images, evenly spaced, and as many fresh latents under
        their labels.
    - `per_class`: also measure the metrics over the images of each class alone (Appendix E).
    - `chord`: also fit a guess and a chord correction to every block, and count the sweeps that they take, for
        `jacobiflow.plan`: `report.tuning`, by `jacobiflow.tune` on 16 fresh latents, or `traced` where these are fewer
        (of all classes, where `labels` is `None`).
    - `seed`: fixes the fresh latents. `jacobiflow.sample` never draws the same ones.
    - `progress`: show bars on a terminal.
    - `out`: write the report to this file. What is finished is kept in the folder `out`.partial until then, so that the
        same call goes on where it was interrupted.

    **Raises:** `ValueError` for images, labels or settings that do not fit the flow, where a fresh latent overflows in
    the exact inverse, and where another process calibrates to `out`. `TypeError` for other kinds of arguments.
    """
    labels, norm, segments, traced, batch_size = _checked(
        flow, images, labels, norm, guidance, segments, traced, per_class, chord, batch_size
    )
    seed = check_seed(seed)
    check_flag("progress", progress)
    if out is not None:
        check_path("out", out)
    settings = Settings(len(images), labels is not None, norm, guidance, segments, min(traced, len(images)), seed)
    console = Console(stderr=True)
    bar = Progress(console=console, disable=not (progress and console.is_terminal), transient=True)
    passes = Passes(flow, [guided(block, guidance) for block in flow.blocks], images, labels, batch_size, bar)
    place = None if out is None else Path(out)
    with keeping(place, lambda: _key(passes, settings, per_class, chord)) as kept:
        with bar:
            report = kept.once("report", Report, partial(_measure, passes, settings, per_class))
        if chord:
            chosen = _spaced(min(traced, SAMPLES), len(images))
            classes = None if labels is None else labels[chosen.to(labels.device)]
            tuning = tune(
                flow, classes, guidance, samples=len(chosen), batch_size=batch_size, seed=seed, progress=progress,
                kept=kept,
            )  # fmt: skip
            report = replace(report, tuning=tuning)
        if place is not None:
            report.save(place)
    return report


def _measure(passes: Passes, settings: Settings, per_class: bool) -> Report:
    """The report without a tuning."""
    flow, labels, norm, segments = passes.flow, passes.labels, settings.norm, settings.segments
    mean_affine, means = passes.parameters(sorted(set(labels.tolist())) if per_class and labels is not None else ())
    guesses = [_guesses(guess) for guess in mean_affine]
    metrics, segment_metrics, class_metrics = passes.metrics(means, guesses, segments, norm)
    chosen = _spaced(settings.traced, settings.num_images)
    solutions: dict[Start, list[BlockSolution]] = {} if settings.guidance else {"images": passes.encoded(chosen)}
    solutions["noise"] = passes.sampled(chosen, settings.seed)
    at = solutions["noise" if settings.guidance else "images"]
    traces = {start: _traces(passes, rows, guesses, start) for start, rows in solutions.items()}
    return Report(
        fingerprint=fingerprint(flow),
        num_tokens=flow.config.num_tokens,
        token_channels=flow.config.token_channels,
        settings=settings,
        metrics=metrics,
        segment_metrics=segment_metrics,
        class_metrics=class_metrics,
        mean_affine=tuple(mean_affine),
        traces=traces,
        segment_traces=_segment_traces(
            passes, solutions["noise"], guesses, metrics[norm], segment_metrics, segments, traces["noise"]
        ),
        gamma=tuple(
            passes.gamma(i, at[i]) for i in passes.bar.track(range(len(flow.blocks)), description="error matrix")
        ),
    )


def _spaced(num: int, num_images: int) -> Int[Tensor, " n"]:
    """The indices of `num` images, evenly spaced."""
    return torch.arange(num) * num_images // num


def _key(passes: Passes, settings: Settings, per_class: bool, chord: bool) -> str:
    """A checksum of all that the measurements depend on."""
    digest = hashlib.sha256()
    for rows in torch.arange(settings.num_images).split(passes.batch_size):
        digest.update(passes.read(rows).cpu().numpy().tobytes())
    labels = None if passes.labels is None else passes.labels.tolist()
    words = (fingerprint(passes.flow), precision(passes.flow), labels, settings, per_class, chord, passes.batch_size)
    digest.update(repr(words).encode())
    return digest.hexdigest()


def _checked(
    flow: ImageFlow, images: Images, labels: Labels | None, norm: Norm, guidance: Guidance | None, segments: int,
    traced: int, per_class: bool, chord: bool, batch_size: int,
) -> tuple[Int[Tensor, " n"] | None, Norm, int, int, int]:  # fmt: skip
    check_flow(flow)
    norm = check_choice("norm", norm, NORMS)
    traced = check_count("traced", traced, most=MOST_SAMPLES)
    batch_size = check_count("batch_size", batch_size, most=MOST_SAMPLES)
    check_flag("per_class", per_class)
    check_flag("chord", chord)
    if chord and traced < 2:
        raise InputValueError(f"traced={traced}: give at least 2, to fit a chord to")
    check_guidance(guidance)
    segments = check_count("segments", segments)
    Segments(segments).check(flow.config.num_tokens)
    if isinstance(images, Tensor):
        flow.check_images(images)
    indexable = hasattr(images, "__getitem__") and hasattr(images, "__len__")
    if not indexable or isinstance(images, str | bytes | Mapping) or getattr(images, "shape", None) == ():
        raise InputTypeError(f"images of type {type(images).__name__}: give a tensor, or what a tensor can index")
    if len(images) < 2:
        raise InputValueError(f"images: {len(images)} of them; give at least 2, better 128, to take means over")
    if labels is None and per_class:
        raise InputValueError("per_class: give the labels of the images")
    classes = None if labels is None else flow.check_labels(labels, len(images))
    return classes, norm, segments, traced, batch_size


def _guesses(mean_affine: MeanAffine) -> dict[str, Guess]:
    return dict(zip(GUESS_NAMES, (Latent(), Zeros(), mean_affine), strict=True))


def _traces(
    passes: Passes, rows: Sequence[BlockSolution], guesses: Sequence[Mapping[str, Guess]], start: Start
) -> tuple[Mapping[str, Trace], ...]:
    """Per block and guess, how sweeps of all tokens converge."""
    blocks = passes.bar.track(range(len(rows)), description=f"sweeps from {start}")
    return tuple({name: passes.traces(i, rows[i], guess, 1)[0] for name, guess in guesses[i].items()} for i in blocks)


def _segment_traces(
    passes: Passes,
    rows: Sequence[BlockSolution],
    guesses: Sequence[Mapping[str, Guess]],
    metrics: Metrics,
    tough: Iterable[int],
    segments: int,
    whole: Sequence[Mapping[str, Trace]],
) -> dict[int, dict[int, tuple[Trace, ...]]]:
    """Per tough block and number of segments, how each of them converges from the block's best guess.

    One segment is what `whole` has.
    """
    length = passes.flow.config.num_tokens
    powers = {2**k for k in range(length.bit_length()) if 2**k <= length // _FEWEST_TOKENS}
    found: dict[int, dict[int, tuple[Trace, ...]]] = {}
    for i in tough:
        best = metrics.best_guess(i)
        counts = passes.bar.track(sorted(({segments} | powers) - {1}), description=f"segments of block {i}")
        cut = {count: passes.traces(i, rows[i], guesses[i][best], count) for count in counts}
        found[i] = {1: (whole[i][best],), **cut}
    return found
