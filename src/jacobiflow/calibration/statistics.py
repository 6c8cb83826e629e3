"""Passes over calibration images: metrics and solutions of the blocks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.blocks.base import AffineBlock, no_gradients
from jacobiflow.blocks.context import Context
from jacobiflow.calibration.convergence import initial_residuals, segment_runs
from jacobiflow.calibration.metrics import NORMS, Components, Metrics, Norm, matrix_norm, tough_blocks
from jacobiflow.calibration.report import GUESS_NAMES, named_guesses
from jacobiflow.errors import InputValueError
from jacobiflow.fixed_point import MeanAffine, Sequential, Solver, solve
from jacobiflow.models.flow import Flow, Step
from jacobiflow.utils.checks import check_finite
from jacobiflow.utils.progress import Progress

Places = Sequence[tuple[int, slice]]  # blocks, with the tokens that are measured


class Images(Protocol):
    """Images that a tensor of indices can index: a tensor (N, C, H, W), or a data set on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Int[Tensor, " b"], /) -> Float[Tensor, "b c h w"]: ...


class BlockSolution(NamedTuple):
    """Pairs X* and z of one block in its causal order, and their context."""

    x: Float[Tensor, "b t c"]
    z: Float[Tensor, "b t c"]
    context: Context

    def split(self, size: int) -> Iterator[BlockSolution]:
        """In parts of so many samples."""
        for start in range(0, len(self.x), size):
            rows = slice(start, start + size)
            yield BlockSolution(self.x[rows], self.z[rows], self.context[rows])


def exact_solutions(
    flow: Flow, latents: Float[Tensor, "n t c"], context: Context, batch_size: int, progress: Progress | None,
    keep: Callable[[int, Callable[[], Tensor]], Tensor] = lambda i, make: make(),
) -> list[BlockSolution]:  # fmt: skip
    """Solves each block by the exact loop at latents. Raises ValueError if one overflows.

    `keep(i, make)` returns the stored answer of block i, or stores the one that it makes.
    """
    blocks, solutions = flow.inverse_blocks, dict[int, BlockSolution]()

    def solve_block(i: int, z: Tensor) -> Tensor:
        x = keep(i, lambda: solve(blocks[i], z, Solver(Sequential()), context, batch_size=batch_size).x).to(z.device)
        overflows = int((~torch.isfinite(x).all(dim=(1, 2))).sum())
        if overflows:
            raise InputValueError(
                f"{overflows} of {len(x)} fresh latents overflow in the exact inverse of block {i}; lower the "
                "guidance, or use a wider dtype"
            )
        solutions[i] = BlockSolution(x, z, context)
        if progress is not None:
            progress(len(solutions), len(blocks), "exact loop")
        return x

    flow.map_blocks_reversed(flow.prior_tokens(latents), solve_block)
    return [solutions[i] for i in range(len(blocks))]


class _Means:
    """Means, in float64, of rows that come in batches: over all rows (`None`), and over those of each class."""

    def __init__(self, classes: Sequence[int] = ()) -> None:
        self._groups: tuple[int | None, ...] = (None, *classes)
        self._sums: dict[Any, Tensor | float] = defaultdict(float)
        self._counts: Counter[Any] = Counter()

    def add(self, key: Any, values: Tensor, labels: Tensor | None) -> None:
        for group in self._groups:
            rows = values if group is None else values[labels == group]
            self._sums[key, group] = self._sums[key, group] + rows.double().sum(dim=0)
            self._counts[key, group] += len(rows)

    def __call__(self, key: Any, group: int | None = None) -> Tensor:
        return torch.as_tensor(self._sums[key, group]) / self._counts[key, group]


@dataclass(frozen=True)
class ImageMeans:
    """Means over the images, per block: of its parameters, and of Sigma^-1 X over all images and over each class's."""

    mean_affine: tuple[MeanAffine, ...]
    scaled_input: tuple[tuple[Tensor, ...], ...]


@dataclass(frozen=True)
class ImageMetrics:
    """The metrics that come from the images alone; see `CalibrationReport`."""

    metrics: Mapping[Norm, Metrics]
    segment_metrics: Mapping[int, Metrics]
    class_metrics: Mapping[int, Metrics]


class CalibrationStatistics:
    """Images in batches, and passes over them. `blocks` are the flow's, guided if guidance is on."""

    def __init__(
        self, flow: Flow, images: Images, context: Context, batch_size: int, progress: Progress | None
    ) -> None:
        self.flow, self.images, self.batch_size, self.progress = flow, images, batch_size, progress
        self.blocks = flow.inverse_blocks
        self.context = context.to(flow.var.device)

    def read(self, index: Int[Tensor, " m"]) -> Float[Tensor, "m c h w"]:
        """The images at `index`."""
        # NumPy takes a tensor of one index for a number, and would leave out the first axis.
        rows = self.images[index.numpy()] if isinstance(self.images, np.ndarray) else self.images[index]
        images = torch.as_tensor(rows).detach()
        self.flow.check_data(images, "images")
        check_finite("images", images)
        return images

    def means(self, classes: Sequence[int]) -> ImageMeans:
        """The first pass over the images."""
        parameters, scaled = _Means(), _Means(classes)
        for tokens, context in self._batches(torch.arange(len(self.images)), "mean parameters"):
            for step in self._walk(tokens, context):
                parameters.add(step.block, torch.stack((step.log_scale, step.shift), dim=1), context.values)
                scaled.add(step.block, torch.exp(-step.log_scale) * step.x, context.values)
        blocks = range(len(self.blocks))
        return ImageMeans(
            tuple(MeanAffine(*parameters(i).float().cpu()) for i in blocks),
            tuple(tuple(scaled(i, group).cpu() for group in (None, *classes)) for i in blocks),
        )

    def metrics(self, image_means: ImageMeans, classes: Sequence[int], segments: int, norm: Norm) -> ImageMetrics:
        """The metrics of the guesses that come from these means, by a second pass over the images.

        Metrics are in each norm; in `norm` also those of each tough block's segments, and those over each class.
        """
        means = _Means(classes)
        scaled = [dict(zip((None, *classes), of_groups, strict=True)) for of_groups in image_means.scaled_input]
        guesses = list(map(named_guesses, image_means.mean_affine))
        every_block = [(i, slice(None)) for i in range(len(self.blocks))]

        def components(norm: Norm, places: Places, group: int | None = None) -> tuple[Components, ...] | None:
            parts = []
            for i, run in places:
                weights = self.blocks[i].output_weights()
                if weights is None:
                    return None
                scale, shift = (0.0 if weight is None else matrix_norm(weight, norm) for weight in weights)
                parts.append(Components(matrix_norm(scaled[i][group][run], norm), scale, shift))
            return tuple(parts)

        tough = tough_blocks([part.crm for part in components(norm, every_block) or ()])
        for tokens, context in self._batches(torch.arange(len(self.images)), "metrics"):
            for i, x, _, _, z in self._walk(tokens, context):
                for count in {1, segments} if i in tough else {1}:
                    for name, guess in guesses[i].items():
                        residuals = initial_residuals(self.blocks[i], x, z, guess, context, count)
                        means.add((i, name, count), residuals, context.values)

        def metrics(norm: Norm, places: Places, group: int | None = None, count: int = 1) -> Metrics:
            igm = tuple(
                {name: matrix_norm(means((i, name, count), group)[run], norm) for name in GUESS_NAMES}
                for i, run in places
            )
            return Metrics(igm, components(norm, places, group))

        runs = segment_runs(self.flow.config.num_tokens, segments)
        return ImageMetrics(
            metrics={each: metrics(each, every_block) for each in NORMS},
            segment_metrics={i: metrics(norm, [(i, run) for run in runs], count=segments) for i in tough},
            class_metrics={label: metrics(norm, every_block, label) for label in classes},
        )

    def encoded(self, index: Int[Tensor, " m"]) -> list[BlockSolution]:
        """Per block, the images at `index` as its solutions: X* with the z that it encodes to."""
        batches = [list(self._walk(tokens, context)) for tokens, context in self._batches(index, "encoding")]
        context = self.context_at(index)
        return [
            BlockSolution(torch.cat([step.x for step in steps]), torch.cat([step.z for step in steps]), context)
            for steps in zip(*batches, strict=True)
        ]

    def context_at(self, index: Int[Tensor, " m"]) -> Context:
        """The context at `index`, on the flow's device."""
        return self.context[index.to(self.flow.var.device)]

    def _batches(self, index: Int[Tensor, " m"], what: str) -> Iterator[tuple[Tensor, Context]]:
        """Tokens in raster order and the context of the images at `index`, on the flow's device."""
        parts = index.split(self.batch_size)
        for i, part in enumerate(parts):
            tokens = self.flow.to_tokens(self.read(part).to(self.flow.var.device, self.flow.state_dtype))
            yield tokens, self.context_at(part)
            if self.progress is not None:
                self.progress(i + 1, len(parts), what)

    def _walk(self, x: Tensor, context: Context) -> Iterator[Step]:
        """Steps of the encoding, with guided parameters and latents; the images are encoded without guidance."""
        for step in self.flow.encode_steps(x, context, lambda i, x: _affine(self.flow.blocks[i], x, context)):
            if not torch.isfinite(step.z).all():
                raise InputValueError(
                    f"images overflow in block {step.block} when they are encoded; are they in [-1, 1]?"
                )
            if self.flow.guidance:
                log_scale, shift = _affine(self.blocks[step.block], step.x, context)
                step = Step(step.block, step.x, log_scale, shift, (step.x - shift) * torch.exp(-log_scale))
            yield step


def _affine(block: AffineBlock, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    with no_gradients(block):
        log_scale, shift = block.affine_whole(x, context)
    return log_scale.clone(), shift.clone()
