"""Calibrate a flow: its metrics over images, and the sweeps that it really takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from jacobiflow.calibration.convergence import Trace, distances, joined
from jacobiflow.calibration.error_matrix import gamma_norm
from jacobiflow.calibration.metrics import (
    NORMS,
    Components,
    Metrics,
    Norm,
    RunningMean,
    initial_residual,
    matrix_norm,
    segment_runs,
)
from jacobiflow.calibration.report import GUESS_NAMES, Report, Settings, Start
from jacobiflow.calibration.tuning import tune
from jacobiflow.flows.base import AffineBlock
from jacobiflow.flows.fingerprint import fingerprint
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.guidance import Guidance, guided
from jacobiflow.latents import FIRST_CALIBRATION_LATENT, draw_latents
from jacobiflow.solvers import Guess, Latent, MeanAffine, Segments, Sequential, Solver, Zeros, solve
from jacobiflow.solvers.solve import no_gradients

_GAMMA_SAMPLES = 8  # each costs some fifty backward passes a block
_FEWEST_TOKENS = 4  # in a segment: with fewer, the sequential loop is the better plan


class Images(Protocol):
    """Images that an index tensor reads: a tensor (N, C, H, W), or a data set on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Int[Tensor, " b"], /) -> Float[Tensor, "b c h w"]: ...


def calibrate(
    flow: ImageFlow,
    images: Images,
    labels: Int[Tensor, " n"] | None = None,
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
) -> Report:
    """Measure which blocks of `flow` are tough, where to start in each, and how long to sweep.

    Per block, over the images: IGM = |g(X^(0)) - X*| for each guess (eq. 4 of the paper) and CRM = |Sigma^-1 X| |W_s| +
    |W_u| (eq. 5), norms of (T, C) matrices that are means over the images. Beside them the truth that they stand for,
    on `traced` samples: the distance to the solution sweep by sweep, and the norm of the error matrix (Appendix A).

    **Arguments:**

    - `images`: (N, C, H, W), two or more, such as the flow was trained on, its noise included; a tensor, or anything
        with a length that an index tensor reads. `batch_size` of them are read at a time.
    - `labels`: (N,) their classes; `None`, or a label below 0, takes the unconditional row.
    - `norm`: the one of `report.igm` and `report.crm`: 2, "fro" or 1. `report.metrics` has them all.
    - `guidance`: the guidance that is to be sampled with. The map, its parameters and hence the metrics are then the
        guided ones, at the images' own tokens; sweeps are measured from fresh noise only.
    - `segments`: into how many segments blocks are cut for the metrics per segment.
    - `traced`: samples whose sweeps are measured: as many of the images, evenly spaced, and as many fresh latents under
        their labels.
    - `per_class`: also measure the metrics over the images of each class alone (Appendix E).
    - `chord`: also fit a guess and a chord correction to every block, and count the sweeps that they take, for
        `jacobiflow.plan`: `report.tuning`, by `jacobiflow.tune` on `traced` fresh latents.
    - `seed`: fixes the fresh latents, which are none of those that `jacobiflow.sample` draws.
    - `progress`: show bars on a terminal.

    **Raises:** `ValueError` for images, labels or settings that do not fit the flow, and where a fresh latent overflows
    in the exact inverse.
    """
    config = flow.config
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r}: give 2, 'fro' or 1")
    for name, value in (("traced", traced), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: give a positive whole number")
    if chord and traced < 2:
        raise ValueError(f"traced={traced}: give at least 2, to fit a chord to")
    if guidance is not None and not isinstance(guidance, Guidance):
        raise ValueError(f"guidance={guidance!r}: give a Guidance, such as Guidance({guidance!r})")
    Segments(segments).check(config.num_tokens)
    if len(images) < 2:
        raise ValueError(f"images: {len(images)} of them; give at least 2, better 128, to take means over")
    if labels is not None:
        if not isinstance(labels, Tensor):
            raise ValueError(f"labels of type {type(labels).__name__}: give a torch.Tensor")
        flow.check_labels(labels, len(images))
    elif per_class:
        raise ValueError("per_class: give the labels of the images")

    console = Console(stderr=True)
    with Progress(console=console, disable=not (progress and console.is_terminal), transient=True) as bar:
        data = _Data(flow, [guided(block, guidance) for block in flow.blocks], images, labels, batch_size, bar)
        everything = torch.arange(len(images))
        mean_affine = data.mean_affine(everything)
        guesses = [_guesses(guess) for guess in mean_affine]
        metrics, segment_metrics = data.metrics(everything, guesses, segments, norm)
        class_metrics = {}
        for label in sorted(set(labels.tolist())) if per_class and labels is not None else ():
            found, _ = data.metrics((labels == label).nonzero()[:, 0].cpu(), guesses, None, norm)
            class_metrics[label] = found[norm]

        chosen = torch.arange(min(traced, len(images))) * len(images) // min(traced, len(images))
        solutions: dict[Start, list[_Solution]] = {} if guidance else {"images": data.encoded(chosen)}
        solutions["noise"] = data.sampled(chosen, seed)
        tough = metrics[norm].tough_blocks if metrics[norm].components is not None else ()
        powers = {2**k for k in range(config.num_tokens.bit_length()) if 2**k <= config.num_tokens // _FEWEST_TOKENS}
        counts = sorted({1, segments} | powers)
        traces: dict[Start, tuple[Mapping[str, Trace], ...]] = {}
        for start, rows in solutions.items():
            blocks = bar.track(range(config.num_blocks), description=f"sweeps from {start}")
            traces[start] = tuple(
                {name: data.traces(i, rows[i], guess, 1)[0] for name, guess in guesses[i].items()} for i in blocks
            )
        segment_traces: dict[int, dict[int, tuple[Trace, ...]]] = {}
        for i in tough:
            best, noise = guesses[i][metrics[norm].best_guess(i)], solutions["noise"][i]
            steps = bar.track(counts, description=f"segments of block {i}")
            segment_traces[i] = {count: data.traces(i, noise, best, count) for count in steps}
        at = solutions["noise" if guidance else "images"]
        blocks = bar.track(range(config.num_blocks), description="error matrix")
        gamma = tuple(data.gamma(i, at[i]) for i in blocks)
    tuning = None
    if chord:
        classes = None if labels is None else labels[chosen.to(labels.device)]
        tuning = tune(flow, classes, guidance, samples=len(chosen), batch_size=batch_size, seed=seed, progress=progress)
    return Report(
        fingerprint=fingerprint(flow),
        num_tokens=config.num_tokens,
        token_channels=config.token_channels,
        settings=Settings(len(images), labels is not None, norm, guidance, segments, len(chosen), seed),
        metrics=metrics,
        segment_metrics=segment_metrics,
        class_metrics=class_metrics,
        mean_affine=tuple(mean_affine),
        traces=traces,
        segment_traces=segment_traces,
        gamma=gamma,
        tuning=tuning,
    )


class _Solution(NamedTuple):
    """Pairs X* and z of one block in its causal order, and their labels."""

    x: Float[Tensor, "b t c"]
    z: Float[Tensor, "b t c"]
    labels: Int[Tensor, " b"] | None


@dataclass(frozen=True)
class _Data:
    """Images in batches, and what passes over them give."""

    flow: ImageFlow
    blocks: Sequence[AffineBlock]
    images: Images
    labels: Int[Tensor, " n"] | None
    batch_size: int
    bar: Progress

    def mean_affine(self, index: Int[Tensor, " m"]) -> list[MeanAffine]:
        """Per block, the mean log-scale and shift over the images at `index`."""
        scales, shifts = ([RunningMean() for _ in self.blocks] for _ in range(2))
        for x, labels in self._batches(index, "mean parameters"):
            for i, (_, log_scale, shift) in enumerate(self._walk(x, labels)):
                scales[i].add(log_scale)
                shifts[i].add(shift)
        means = [(s.value.float().cpu(), u.value.float().cpu()) for s, u in zip(scales, shifts, strict=True)]
        for i, parameters in enumerate(means):
            if not all(torch.isfinite(mean).all() for mean in parameters):
                raise ValueError(f"images overflow in block {i} when they are encoded; are they in [-1, 1]?")
        return [MeanAffine(*parameters) for parameters in means]

    def metrics(
        self, index: Int[Tensor, " m"], guesses: Sequence[Mapping[str, Guess]], count: int | None, norm: Norm
    ) -> tuple[dict[Norm, Metrics], tuple[Metrics, ...]]:
        """The blocks' metrics in each norm, and with `count` those of each block's segments in `norm`."""
        scaled = [RunningMean() for _ in self.blocks]
        residuals = [{(name, k): RunningMean() for name in GUESS_NAMES for k in (1, count) if k} for _ in self.blocks]
        for tokens, labels in self._batches(index, "metrics"):
            for i, (x, log_scale, shift) in enumerate(self._walk(tokens, labels)):
                z = (x - shift) * torch.exp(-log_scale)
                scaled[i].add(torch.exp(-log_scale) * x)
                for (name, k), mean in residuals[i].items():
                    mean.add(initial_residual(self.blocks[i], x, z, guesses[i][name], labels, k))

        def of(i: int, run: slice, k: int, norm: Norm) -> tuple[dict[str, float], Components | None]:
            igm = {name: matrix_norm(residuals[i][name, k].value[run], norm) for name in GUESS_NAMES}
            weights = self.blocks[i].output_weights()
            if weights is None:
                return igm, None
            w_s, w_u = weights
            return igm, Components(
                matrix_norm(scaled[i].value[run], norm),
                0.0 if w_s is None else matrix_norm(w_s, norm),
                matrix_norm(w_u, norm),
            )

        everything, num_blocks = slice(0, self.flow.config.num_tokens), range(len(self.blocks))
        whole = {norm: _joined_metrics([of(i, everything, 1, norm) for i in num_blocks]) for norm in NORMS}
        runs = segment_runs(self.flow.config.num_tokens, count) if count else ()
        return whole, tuple(_joined_metrics([of(i, run, count or 1, norm) for run in runs]) for i in num_blocks)

    def encoded(self, index: Int[Tensor, " m"]) -> list[_Solution]:
        """Per block, the images at `index` as its solutions: X* with the z that it encodes to."""
        parts = [
            [(x, (x - shift) * torch.exp(-log_scale)) for x, log_scale, shift in self._walk(tokens, labels)]
            for tokens, labels in self._batches(index, "encoding")
        ]
        labels = None if self.labels is None else self.labels[index.to(self.labels.device)].to(self.flow.var.device)
        return [
            _Solution(torch.cat([x for x, _ in batch]), torch.cat([z for _, z in batch]), labels)
            for batch in zip(*parts, strict=True)
        ]

    def sampled(self, index: Int[Tensor, " m"], seed: int) -> list[_Solution]:
        """Per block, its sequential solutions for fresh latents under the labels at `index`."""
        config, var = self.flow.config, self.flow.var
        labels = None if self.labels is None else self.labels[index.to(self.labels.device)].to(var.device)
        z = draw_latents(len(index), config.num_tokens, config.token_channels, seed, FIRST_CALIBRATION_LATENT)
        z = z.to(var.device, _state_dtype(var)) * var.sqrt().to(_state_dtype(var))
        found: list[_Solution] = []
        for i in self.bar.track(range(len(self.blocks) - 1, -1, -1), description="sampling"):
            permutation = self.flow.blocks[i].permutation
            z = permutation(z)
            solved = [
                solve(self.blocks[i], rows, Solver(Sequential()), context).x
                for rows, context in self._chunks(z, labels)
            ]
            x = torch.cat(solved)
            if not torch.isfinite(x).all():
                lost = int((~torch.isfinite(x).all(dim=(1, 2))).sum())
                raise ValueError(
                    f"{lost} of {len(x)} fresh latents overflow in the exact inverse of block {i}; lower the guidance, "
                    "or use a wider dtype"
                )
            found.append(_Solution(x, z, labels))
            z = permutation(x)
        return found[::-1]

    def traces(self, i: int, at: _Solution, guess: Guess, count: int) -> tuple[Trace, ...]:
        """A trace for each of the `count` segments of block `i`."""
        curves = [
            distances(self.blocks[i], x, z, guess, labels, count)
            for x, (z, labels) in zip(at.x.split(self.batch_size), self._chunks(at.z, at.labels), strict=True)
        ]
        return tuple(Trace.of(joined(parts)) for parts in zip(*curves, strict=True))

    def gamma(self, i: int, at: _Solution) -> tuple[float, ...]:
        """The norm of block `i`'s error matrix at the first few solutions."""
        few, labels = slice(_GAMMA_SAMPLES), None if at.labels is None else at.labels[:_GAMMA_SAMPLES]
        chunks = zip(at.x[few].split(self.batch_size), self._chunks(at.z[few], labels), strict=True)
        return tuple(torch.cat([gamma_norm(self.blocks[i], x, z, rows) for x, (z, rows) in chunks]).tolist())

    def _batches(self, index: Int[Tensor, " m"], what: str) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Tokens in raster order and labels of the images at `index`, on the flow's device."""
        config, var = self.flow.config, self.flow.var
        want = (config.in_channels, config.image_size, config.image_size)
        for part in self.bar.track(index.split(self.batch_size), description=what):
            try:
                images = torch.as_tensor(self.images[part]).detach()
            except TypeError as error:
                raise ValueError(
                    f"images of type {type(self.images).__name__}: give a tensor, or what an index tensor reads"
                ) from error
            if not images.is_floating_point() or images.shape != (len(part), *want):
                have = f"{images.dtype} of shape {tuple(images.shape)}"
                raise ValueError(f"images: {have}; this flow takes floating-point numbers of shape (N, {want[0]}, "
                                 f"{want[1]}, {want[2]}), nominally in [-1, 1]")  # fmt: skip
            wrong = ~torch.isfinite(images).all(dim=(1, 2, 3))
            if wrong.any():
                raise ValueError(f"images: number {int(part[wrong.cpu()][0])} holds a NaN or an infinity; leave it out")
            labels = None if self.labels is None else self.labels[part.to(self.labels.device)].to(var.device)
            tokens, _ = self.flow.to_tokens(images.to(var.device, _state_dtype(var)))
            yield tokens, labels

    def _walk(self, x: Tensor, labels: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Per block in encoding order, its solution X* and there its parameters, guided; X* goes on unguided."""
        for inner, block in zip(self.flow.blocks, self.blocks, strict=True):
            x = inner.permutation(x)
            log_scale, shift = _affine(block, x, labels)
            yield x, log_scale, shift
            if block is not inner:
                log_scale, shift = _affine(inner, x, labels)
            x = inner.permutation((x - shift) * torch.exp(-log_scale))

    def _chunks(self, z: Tensor, labels: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        rows = z.split(self.batch_size)
        yield from zip(rows, [None] * len(rows) if labels is None else labels.split(self.batch_size), strict=True)


def _guesses(mean_affine: MeanAffine) -> dict[str, Guess]:
    return dict(zip(GUESS_NAMES, (Latent(), Zeros(), mean_affine), strict=True))


def _joined_metrics(rows: Sequence[tuple[dict[str, float], Components | None]]) -> Metrics:
    components = [part for _, part in rows if part is not None]
    return Metrics(tuple(igm for igm, _ in rows), tuple(components) if len(components) == len(rows) else None)


def _affine(block: AffineBlock, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    with no_gradients(block):
        log_scale, shift = block.affine(x, 0, x.shape[1], block.init_cache(x, labels))
    return log_scale.clone(), shift.clone()


def _state_dtype(var: Tensor) -> torch.dtype:
    return torch.float64 if var.dtype == torch.float64 else torch.float32
