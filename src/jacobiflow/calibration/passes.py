"""Passes over calibration images: mean parameters, metrics, solutions of the blocks, and sweeps towards them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
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
from jacobiflow.calibration.report import GUESS_NAMES
from jacobiflow.calibration.tune import check_finite
from jacobiflow.flows.base import AffineBlock
from jacobiflow.flows.image_flow import ImageFlow, state_dtype
from jacobiflow.inversion import invert, prior_tokens
from jacobiflow.latents import FIRST_CALIBRATION_LATENT, draw_latents
from jacobiflow.solvers import Guess, MeanAffine, Sequential, Solver, no_gradients, solve

_SWEPT_TOGETHER = 8  # samples of a trace, which are swept until the slowest of them has settled
_GAMMA_SAMPLES = 8  # each costs some thirty backward passes a block


class Images(Protocol):
    """Images that a tensor of indices can index: a tensor (N, C, H, W), or a data set on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Int[Tensor, " b"], /) -> Float[Tensor, "b c h w"]: ...


class BlockSolution(NamedTuple):
    """Pairs X* and z of one block in its causal order, and their labels."""

    x: Float[Tensor, "b t c"]
    z: Float[Tensor, "b t c"]
    labels: Int[Tensor, " b"] | None

    def split(self, size: int) -> Iterator[BlockSolution]:
        """In parts of so many samples."""
        labels = repeat(None) if self.labels is None else self.labels.split(size)
        yield from map(BlockSolution, self.x.split(size), self.z.split(size), labels)


class _Means:
    """Means over images at a block: of Sigma^-1(X) X, and of the residual of each guess in so many segments."""

    def __init__(self) -> None:
        self._scaled = RunningMean()
        self._residuals: defaultdict[tuple[str, int], RunningMean] = defaultdict(RunningMean)

    def add(self, scaled: Float[Tensor, "b t c"], residuals: Mapping[tuple[str, int], Float[Tensor, "b t c"]]) -> None:
        """Add images."""
        self._scaled.add(scaled)
        for key, values in residuals.items():
            self._residuals[key].add(values)

    def metrics(
        self, block: AffineBlock, run: slice, count: int, norm: Norm
    ) -> tuple[dict[str, float], Components | None]:
        """IGM of each guess and the components of CRM, of a run of tokens of `count` segments."""
        igm = {name: matrix_norm(self._residuals[name, count].value[run], norm) for name in GUESS_NAMES}
        weights = block.output_weights()
        if weights is None:
            return igm, None
        w_s, w_u = weights
        return igm, Components(
            matrix_norm(self._scaled.value[run], norm),
            0.0 if w_s is None else matrix_norm(w_s, norm),
            matrix_norm(w_u, norm),
        )


@dataclass(frozen=True)
class Passes:
    """Images in batches, and what passes over them give. `blocks` are the flow's, under guidance where that is on."""

    flow: ImageFlow
    blocks: Sequence[AffineBlock]
    images: Images
    labels: Int[Tensor, " n"] | None
    batch_size: int
    bar: Progress

    def read(self, index: Int[Tensor, " m"]) -> Float[Tensor, "m c h w"]:
        """The images at `index`. **Raises** `ValueError` where they are none of this flow, or not finite."""
        try:
            # NumPy takes a tensor of one index for a number, and would leave out the first axis.
            rows = self.images[index.numpy()] if isinstance(self.images, np.ndarray) else self.images[index]
            images = torch.as_tensor(rows).detach()
        except TypeError as error:
            raise TypeError(
                f"images of type {type(self.images).__name__}: give a tensor, or what a tensor can index"
            ) from error
        self.flow.check_images(images)
        wrong = ~torch.isfinite(images).all(dim=(1, 2, 3))
        if wrong.any():
            raise ValueError(f"images: number {int(index[wrong.cpu()][0])} holds a NaN or an infinity; leave it out")
        return images

    def mean_affine(self) -> list[MeanAffine]:
        """Per block, the mean log-scale and shift over all images."""
        scales, shifts = ([RunningMean() for _ in self.blocks] for _ in range(2))
        for x, labels in self._batches(torch.arange(len(self.images)), "mean parameters"):
            for i, (_, log_scale, shift) in enumerate(self._walk(x, labels)):
                scales[i].add(log_scale)
                shifts[i].add(shift)
        means = [(s.value.float().cpu(), u.value.float().cpu()) for s, u in zip(scales, shifts, strict=True)]
        for i, parameters in enumerate(means):
            if not all(torch.isfinite(mean).all() for mean in parameters):
                raise ValueError(f"the parameters of block {i} overflow at the images; lower the guidance")
        return [MeanAffine(*parameters) for parameters in means]

    def metrics(
        self, guesses: Sequence[Mapping[str, Guess]], segments: int, norm: Norm, classes: Sequence[int]
    ) -> tuple[dict[Norm, Metrics], tuple[Metrics, ...], dict[int, Metrics]]:
        """The blocks' metrics in each norm; in `norm` those of each block's segments, and those over each class."""
        groups: dict[int | None, list[_Means]] = {group: [_Means() for _ in self.blocks] for group in (None, *classes)}
        for tokens, labels in self._batches(torch.arange(len(self.images)), "metrics"):
            for i, (x, log_scale, shift) in enumerate(self._walk(tokens, labels)):
                scaled, z = torch.exp(-log_scale) * x, (x - shift) * torch.exp(-log_scale)
                residuals = {
                    (name, count): initial_residual(self.blocks[i], x, z, guess, labels, count)
                    for name, guess in guesses[i].items()
                    for count in (1, segments)
                }
                for group, means in groups.items():
                    rows = slice(None) if group is None or labels is None else labels == group
                    means[i].add(scaled[rows], {key: values[rows] for key, values in residuals.items()})

        def over(group: int | None, norm: Norm) -> Metrics:
            everything = slice(0, self.flow.config.num_tokens)
            blocks = zip(self.blocks, groups[group], strict=True)
            return _joined_metrics([means.metrics(block, everything, 1, norm) for block, means in blocks])

        runs = segment_runs(self.flow.config.num_tokens, segments)
        cut = tuple(
            _joined_metrics([means.metrics(block, run, segments, norm) for run in runs])
            for block, means in zip(self.blocks, groups[None], strict=True)
        )
        return {each: over(None, each) for each in NORMS}, cut, {label: over(label, norm) for label in classes}

    def encoded(self, index: Int[Tensor, " m"]) -> list[BlockSolution]:
        """Per block, the images at `index` as its solutions: X* with the z that it encodes to."""
        parts = [
            [(x, (x - shift) * torch.exp(-log_scale)) for x, log_scale, shift in self._walk(tokens, labels)]
            for tokens, labels in self._batches(index, "encoding")
        ]
        labels = None if self.labels is None else self.labels[index.to(self.labels.device)].to(self.flow.var.device)
        return [
            BlockSolution(torch.cat([x for x, _ in batch]), torch.cat([z for _, z in batch]), labels)
            for batch in zip(*parts, strict=True)
        ]

    def sampled(self, index: Int[Tensor, " m"], seed: int) -> list[BlockSolution]:
        """Per block, its sequential solutions for fresh latents under the labels at `index`."""
        config, device = self.flow.config, self.flow.var.device
        labels = None if self.labels is None else self.labels[index.to(self.labels.device)].to(device)
        latents = draw_latents(len(index), config.num_tokens, config.token_channels, seed, FIRST_CALIBRATION_LATENT)
        found: dict[int, BlockSolution] = {}
        task = self.bar.add_task("sampling", total=len(self.blocks))

        def solve_block(i: int, z: Tensor) -> Tensor:
            x = solve(self.blocks[i], z, Solver(Sequential()), labels, self.batch_size).x
            check_finite(x, f"fresh latents overflow in the exact inverse of block {i}")
            found[i] = BlockSolution(x, z, labels)
            self.bar.advance(task)
            return x

        invert(self.flow, prior_tokens(self.flow, latents), solve_block)
        return [found[i] for i in range(len(self.blocks))]

    def traces(self, i: int, at: BlockSolution, guess: Guess, count: int) -> tuple[Trace, ...]:
        """A trace for each of the `count` segments of block `i`."""
        curves = [
            distances(self.blocks[i], x, z, guess, labels, count)
            for x, z, labels in at.split(min(self.batch_size, _SWEPT_TOGETHER))
        ]
        return tuple(Trace.of(joined(parts)) for parts in zip(*curves, strict=True))

    def gamma(self, i: int, at: BlockSolution) -> tuple[float, ...]:
        """The norm of block `i`'s error matrix at the first few solutions."""
        parts = next(at.split(_GAMMA_SAMPLES)).split(self.batch_size)
        return tuple(torch.cat([gamma_norm(self.blocks[i], x, z, labels) for x, z, labels in parts]).tolist())

    def _batches(self, index: Int[Tensor, " m"], what: str) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Tokens in raster order and labels of the images at `index`, on the flow's device."""
        var = self.flow.var
        for part in self.bar.track(index.split(self.batch_size), description=what):
            images = self.read(part)
            labels = None if self.labels is None else self.labels[part.to(self.labels.device)].to(var.device)
            tokens, _ = self.flow.to_tokens(images.to(var.device, state_dtype(self.flow)))
            yield tokens, labels

    def _walk(self, x: Tensor, labels: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Per block in encoding order, X* and the guided parameters at it; the images are encoded without guidance."""
        for step in self.flow.walk(x, labels, lambda i, x: _affine(self.flow.blocks[i], x, labels)):
            if not torch.isfinite(step.z).all():
                raise ValueError(f"images overflow in block {step.block} when they are encoded; are they in [-1, 1]?")
            block = self.blocks[step.block]
            if block is self.flow.blocks[step.block]:
                yield step.x, step.log_scale, step.shift
            else:
                yield step.x, *_affine(block, step.x, labels)


def _joined_metrics(rows: Sequence[tuple[dict[str, float], Components | None]]) -> Metrics:
    components = [part for _, part in rows if part is not None]
    return Metrics(tuple(igm for igm, _ in rows), tuple(components) if len(components) == len(rows) else None)


def _affine(block: AffineBlock, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    with no_gradients(block):
        log_scale, shift = block.affine_whole(x, labels)
    return log_scale.clone(), shift.clone()
