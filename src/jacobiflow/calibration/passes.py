"""Passes over calibration images: mean parameters, metrics, solutions of the blocks, and sweeps towards them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product, repeat
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.calibration.convergence import Trace, distances, joined
from jacobiflow.calibration.error_matrix import gamma_norm
from jacobiflow.calibration.metrics import (
    NORMS,
    Components,
    Metrics,
    Norm,
    initial_residuals,
    matrix_norm,
    segment_runs,
    tough_blocks,
)
from jacobiflow.calibration.report import GUESS_NAMES
from jacobiflow.errors import InputTypeError, InputValueError
from jacobiflow.flows.base import AffineBlock
from jacobiflow.flows.image_flow import ImageFlow, state_dtype
from jacobiflow.inversion import invert, prior_tokens
from jacobiflow.latents import FIRST_CALIBRATION_LATENT, draw_latents
from jacobiflow.progress import Progress
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


class LatentOverflowError(InputValueError):
    """The exact inverse of a latent is not finite."""


def exact_solutions(
    flow: ImageFlow, blocks: Sequence[AffineBlock], latents: Float[Tensor, "n t c"], labels: Int[Tensor, " n"] | None,
    batch_size: int, progress: Progress | None = None,
) -> list[BlockSolution]:  # fmt: skip
    """Solves each block by the exact loop at latents. Raises LatentOverflowError if one overflows."""
    solutions: dict[int, BlockSolution] = {}

    def solve_block(i: int, z: Tensor) -> Tensor:
        x = solve(blocks[i], z, Solver(Sequential()), labels, batch_size).x
        overflows = int((~torch.isfinite(x).all(dim=(1, 2))).sum())
        if overflows:
            raise LatentOverflowError(
                f"{overflows} of {len(x)} fresh latents overflow in the exact inverse of block {i}; lower the "
                "guidance, or use a wider dtype"
            )
        solutions[i] = BlockSolution(x, z, labels)
        if progress is not None:
            progress(len(solutions), len(blocks), "exact loop")
        return x

    invert(flow, prior_tokens(flow, latents), solve_block)
    return [solutions[i] for i in range(len(blocks))]


class RunningMean:
    """The mean, in float64, over rows that come in batches."""

    def __init__(self) -> None:
        self._count = 0
        self._total: Tensor | float = 0.0

    def add(self, values: Tensor) -> None:
        """Adds the rows of `values`."""
        self._total = self._total + values.double().sum(dim=0)
        self._count += len(values)

    @property
    def value(self) -> Tensor:
        """The mean of all rows so far."""
        return torch.as_tensor(self._total) / self._count


class _Means:
    """Means over images at a block: of Sigma^-1(X) X, and of the residual of each guess in so many segments."""

    def __init__(self, block: AffineBlock) -> None:
        self._block = block
        self.scaled = RunningMean()
        self.residuals: defaultdict[tuple[str, int], RunningMean] = defaultdict(RunningMean)

    def components(self, norm: Norm, run: slice = slice(None)) -> Components | None:
        """The components of CRM, of a run of tokens; `None` if it is not defined."""
        weights = self._block.output_weights()
        if weights is None:
            return None
        w_s, w_u = weights
        return Components(
            matrix_norm(self.scaled.value[run], norm),
            0.0 if w_s is None else matrix_norm(w_s, norm),
            matrix_norm(w_u, norm),
        )

    def igm(self, norm: Norm, run: slice = slice(None), count: int = 1) -> dict[str, float]:
        """IGM of each guess, of a run of tokens of `count` segments."""
        return {name: matrix_norm(self.residuals[name, count].value[run], norm) for name in GUESS_NAMES}


Groups = Mapping[int | None, Sequence[_Means]]
"""Per block, means over all images under `None`, and over those of each class under its label."""


@dataclass(frozen=True)
class Passes:
    """Images in batches, and passes over them. `blocks` are the flow's, guided if guidance is on."""

    flow: ImageFlow
    blocks: Sequence[AffineBlock]
    images: Images
    labels: Int[Tensor, " n"] | None
    batch_size: int
    progress: Progress | None

    def read(self, index: Int[Tensor, " m"]) -> Float[Tensor, "m c h w"]:
        """The images at `index`. Raises ValueError if they do not fit the flow or are not finite."""
        try:
            # NumPy takes a tensor of one index for a number, and would leave out the first axis.
            rows = self.images[index.numpy()] if isinstance(self.images, np.ndarray) else self.images[index]
            images = torch.as_tensor(rows).detach()
        except TypeError as error:
            raise InputTypeError(
                f"images of type {type(self.images).__name__}: give a tensor, or what a tensor can index"
            ) from error
        self.flow.check_images(images)
        wrong = ~torch.isfinite(images).flatten(1).all(dim=1)
        if wrong.any():
            raise InputValueError(
                f"images: number {int(index[wrong.cpu()][0])} holds a NaN or an infinity; leave it out"
            )
        return images

    def parameters(self, classes: Sequence[int]) -> tuple[list[MeanAffine], Groups]:
        """Per block, the mean log-scale and shift over all images; and the means that CRM needs."""
        scales, shifts = ([RunningMean() for _ in self.blocks] for _ in range(2))
        groups: Groups = {group: [_Means(block) for block in self.blocks] for group in (None, *classes)}
        for tokens, labels in self._batches(torch.arange(len(self.images)), "mean parameters"):
            for i, (x, log_scale, shift) in enumerate(self._walk(tokens, labels)):
                scales[i].add(log_scale)
                shifts[i].add(shift)
                for group, means in groups.items():
                    means[i].scaled.add((torch.exp(-log_scale) * x)[_members(group, labels)])
        parameters = [(s.value.float().cpu(), u.value.float().cpu()) for s, u in zip(scales, shifts, strict=True)]
        for i, pair in enumerate(parameters):
            if not all(torch.isfinite(mean).all() for mean in pair):
                raise InputValueError(f"the parameters of block {i} overflow at the images; lower the guidance")
        return [MeanAffine(*pair) for pair in parameters], groups

    def metrics(
        self, groups: Groups, guesses: Sequence[Mapping[str, Guess]], segments: int, norm: Norm
    ) -> tuple[dict[Norm, Metrics], dict[int, Metrics], dict[int, Metrics]]:
        """The blocks' metrics in each norm; in `norm` those of each tough block's segments, and those over each class.

        `groups` are those of `parameters`, to which the residuals of the guesses are added.
        """
        of_all = groups[None]
        components = [means.components(norm) for means in of_all]
        tough = tough_blocks([part.crm for part in components if part is not None])
        for tokens, labels in self._batches(torch.arange(len(self.images)), "metrics"):
            for i, (x, log_scale, shift) in enumerate(self._walk(tokens, labels)):
                z = (x - shift) * torch.exp(-log_scale)
                for count in {1, segments} if i in tough else {1}:
                    residuals = initial_residuals(self.blocks[i], x, z, guesses[i], labels, count)
                    for (group, means), (name, values) in product(groups.items(), residuals.items()):
                        means[i].residuals[name, count].add(values[_members(group, labels)])
        runs = segment_runs(self.flow.config.num_tokens, segments)
        return (
            {each: _metrics((means.igm(each), means.components(each)) for means in of_all) for each in NORMS},
            {
                i: _metrics((of_all[i].igm(norm, run, segments), of_all[i].components(norm, run)) for run in runs)
                for i in tough
            },
            {
                label: _metrics((means.igm(norm), means.components(norm)) for means in groups[label])
                for label in groups if label is not None
            },
        )  # fmt: skip

    def encoded(self, index: Int[Tensor, " m"]) -> list[BlockSolution]:
        """Per block, the images at `index` as its solutions: X* with the z that it encodes to."""
        parts = [
            [(x, (x - shift) * torch.exp(-log_scale)) for x, log_scale, shift in self._walk(tokens, labels)]
            for tokens, labels in self._batches(index, "encoding")
        ]
        labels = self._labels(index)
        return [
            BlockSolution(torch.cat([x for x, _ in batch]), torch.cat([z for _, z in batch]), labels)
            for batch in zip(*parts, strict=True)
        ]

    def sampled(self, index: Int[Tensor, " m"], seed: int) -> list[BlockSolution]:
        """Per block, its exact solutions for fresh latents under the labels at `index`."""
        config = self.flow.config
        latents = draw_latents(len(index), config.num_tokens, config.token_channels, seed, FIRST_CALIBRATION_LATENT)
        return exact_solutions(self.flow, self.blocks, latents, self._labels(index), self.batch_size, self.progress)

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

    def _labels(self, index: Int[Tensor, " m"]) -> Int[Tensor, " m"] | None:
        """The labels at `index`, on the flow's device."""
        return None if self.labels is None else self.labels[index.to(self.labels.device)].to(self.flow.var.device)

    def _batches(self, index: Int[Tensor, " m"], what: str) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Tokens in raster order and labels of the images at `index`, on the flow's device."""
        parts = index.split(self.batch_size)
        for i, part in enumerate(parts):
            tokens, _ = self.flow.to_tokens(self.read(part).to(self.flow.var.device, state_dtype(self.flow)))
            yield tokens, self._labels(part)
            if self.progress is not None:
                self.progress(i + 1, len(parts), what)

    def _walk(self, x: Tensor, labels: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Per block in encoding order, X* and the guided parameters at it; the images are encoded without guidance."""
        for step in self.flow.walk(x, labels, lambda i, x: _affine(self.flow.blocks[i], x, labels)):
            if not torch.isfinite(step.z).all():
                raise InputValueError(
                    f"images overflow in block {step.block} when they are encoded; are they in [-1, 1]?"
                )
            block = self.blocks[step.block]
            if block is self.flow.blocks[step.block]:
                yield step.x, step.log_scale, step.shift
            else:
                yield step.x, *_affine(block, step.x, labels)


def _members(group: int | None, labels: Tensor | None) -> Tensor | slice:
    """The images of a batch that are in a group."""
    return slice(None) if group is None or labels is None else labels == group


def _metrics(rows: Iterable[tuple[dict[str, float], Components | None]]) -> Metrics:
    igm, components = zip(*rows, strict=True)
    return Metrics(igm, None if None in components else components)


def _affine(block: AffineBlock, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    with no_gradients(block):
        log_scale, shift = block.affine_whole(x, labels)
    return log_scale.clone(), shift.clone()
