"""Passes over calibration images: means, metrics and exact solutions of the blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.blocks.base import AffineBlock, no_gradients
from jacobiflow.blocks.context import Context
from jacobiflow.calibration.convergence import initial_residuals, segment_slices
from jacobiflow.calibration.metrics import NORMS, Components, Metrics, Norm, matrix_norm, tough_blocks
from jacobiflow.calibration.report import GUESS_NAMES, guesses_by_name
from jacobiflow.distributed import Processes
from jacobiflow.errors import InputValueError
from jacobiflow.fixed_point import MeanAffine, Sequential, Solver, solve
from jacobiflow.models.flow import Flow, Step
from jacobiflow.utils.checks import check_finite
from jacobiflow.utils.progress import Progress
from jacobiflow.utils.store import MeasurementStore

Places = Sequence[tuple[int, slice]]  # blocks, with the tokens that are measured

_MAX_CHUNKS = 32  # Chunks of the images whose sums are in memory at once, and that processes share.


class Images(Protocol):
    """Images that a tensor of indices can index: a tensor (N, C, H, W), or a data set on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Int[Tensor, " b"], /) -> Float[Tensor, "b c h w"]: ...


class BlockSolution(NamedTuple):
    """Solutions X* of one block at z, in its causal order, and their context."""

    x: Float[Tensor, "b t c"]
    z: Float[Tensor, "b t c"]
    context: Context

    def to(self, device: torch.device) -> BlockSolution:
        """Returns the solutions on another device."""
        return BlockSolution(self.x.to(device), self.z.to(device), self.context.to(device))

    def split(self, size: int) -> Iterator[BlockSolution]:
        """Splits the solutions into batches of `size` samples."""
        for start in range(0, len(self.x), size):
            rows = slice(start, start + size)
            yield BlockSolution(self.x[rows], self.z[rows], self.context[rows])


def exact_solutions(
    flow: Flow, latents: Float[Tensor, "n t c"], context: Context, batch_size: int, progress: Progress | None,
    store: MeasurementStore | None = None,
) -> list[BlockSolution]:  # fmt: skip
    """Solves each block by the exact loop at standard normal latents. Raises ValueError if one overflows."""
    store, num = store or MeasurementStore(), flow.config.num_blocks
    tokens, solutions = flow.prior_tokens(latents), list[BlockSolution]()
    for i in reversed(range(num)):
        permutation = flow.blocks[i].permutation
        z = permutation(tokens)
        x = store.load_or_measure(f"exact-{i}", Tensor, partial(_solve_exactly, flow, i, z, context, batch_size))
        overflows = int((~torch.isfinite(x).all(dim=(1, 2))).sum())
        if overflows:
            raise InputValueError(
                f"{overflows} of {len(x)} fresh latents overflow in the exact inverse of block {i}; lower the "
                "guidance, or use a wider dtype"
            )
        solutions.append(BlockSolution(x.to(z.device), z, context))
        tokens = permutation.inverse(solutions[-1].x)
        if progress is not None:
            progress(len(solutions), num, "exact loop")
    return solutions[::-1]


def _solve_exactly(flow: Flow, i: int, z: Tensor, context: Context, batch_size: int) -> Tensor:
    return solve(flow.inverse_block(i), z, Solver(Sequential()), context, batch_size=batch_size).x


class _Means:
    """Means of rows that come in batches: over all rows (group `None`), and over those of each class."""

    def __init__(self, groups: Sequence[int | None]) -> None:
        self._groups = groups
        self._totals = dict[Any, Tensor]()
        self._nums = Counter[Any]()

    def add(self, key: Any, values: Tensor, labels: Tensor | None) -> None:
        """Adds rows to the means under `key`; without labels only to that over all rows."""
        for group in self._groups if labels is not None else (None,):
            rows = values if group is None else values[labels == group]
            if len(rows):
                self._add((key, group), rows.double().sum(dim=0).cpu(), len(rows))

    def merge(self, other: _Means) -> None:
        """Adds the rows of other batches."""
        for place, total in other._totals.items():
            self._add(place, total, other._nums[place])

    def mean(self, key: Any, group: int | None = None) -> Tensor:
        """Returns the mean of a group's rows under `key`."""
        return self._totals[key, group] / self._nums[key, group]

    def _add(self, place: Any, total: Tensor, num: int) -> None:
        self._totals[place] = self._totals.get(place, 0) + total
        self._nums[place] += num


@dataclass(frozen=True)
class ImageMeans:
    """Per block, means over the images.

    Attributes:
        mean_affine: The guess of the mean scale and shift.
        scaled_input: The mean of Sigma^-1 X over all images, then over the images of each class.
    """

    mean_affine: tuple[MeanAffine, ...]
    scaled_input: tuple[tuple[Tensor, ...], ...]


@dataclass(frozen=True)
class ImageMetrics:
    """The metrics in a report, which come from the images alone; see `CalibrationReport`."""

    metrics: Mapping[Norm, Metrics]
    segment_metrics: Mapping[int, Metrics]
    class_metrics: Mapping[int, Metrics]


class CalibrationStatistics:
    """A flow's statistics over images, measured in batches.

    Args:
        flow: The model. Under guidance its guided maps are measured, but the images are encoded without guidance.
        images: Two or more images.
        context: Context of each image.
        classes: Classes that have statistics of their own.
        batch_size: Images in memory at a time.
        progress: Is called after each batch.
        processes: The processes that share the images. Each of them calls the methods.
    """

    def __init__(
        self, flow: Flow, images: Images, context: Context, classes: Sequence[int], batch_size: int,
        progress: Progress | None, processes: Processes,
    ) -> None:  # fmt: skip
        self.flow, self.images, self.batch_size, self.progress = flow, images, batch_size, progress
        self.processes = processes
        self.classes = classes
        self.context = context.to(flow.var.device)
        self._groups = (None, *classes)

    def read(self, index: Int[Tensor, " m"]) -> Float[Tensor, "m c h w"]:
        """Returns the images at `index`."""
        # NumPy takes a tensor of one index for a number, and would leave out the first axis.
        rows = self.images[index.numpy()] if isinstance(self.images, np.ndarray) else self.images[index]
        images = torch.as_tensor(rows).detach()
        self.flow.check_data(images, "images")
        check_finite("images", images)
        return images

    def image_means(self) -> ImageMeans:
        """Measures the means over the images, in one pass."""
        means = self._means(self._add_parameters, "mean parameters")
        blocks = range(self.flow.config.num_blocks)
        return ImageMeans(
            tuple(MeanAffine(*means.mean((i, "affine")).float()) for i in blocks),
            tuple(tuple(means.mean((i, "scaled"), group) for group in self._groups) for i in blocks),
        )

    def _add_parameters(self, means: _Means, tokens: Tensor, context: Context) -> None:
        for step in self._encode(tokens, context):
            means.add((step.block, "scaled"), torch.exp(-step.log_scale) * step.x, context.values)
            means.add((step.block, "affine"), torch.stack((step.log_scale, step.shift), dim=1), None)

    def image_metrics(self, means: ImageMeans, num_segments: int, norm: Norm) -> ImageMetrics:
        """Measures IGM and CRM, in a second pass over the images.

        The metrics of all images are in each norm. Those of a tough block's segments, and of each class, are in `norm`.
        """
        blocks = [(i, slice(None)) for i in range(self.flow.config.num_blocks)]
        components = self._components([(i, means.scaled_input[i][0]) for i, _ in blocks], norm)
        tough = tough_blocks([each.crm for each in components or ()])
        residuals = self._mean_residuals(means, tough, num_segments)
        segments = segment_slices(self.flow.config.num_tokens, num_segments)

        def metrics(norm: Norm, places: Places, group: int | None = None, count: int = 1) -> Metrics:
            matrices = [(i, means.scaled_input[i][self._groups.index(group)][tokens]) for i, tokens in places]
            igm = (
                {name: matrix_norm(residuals.mean((i, name, count), group)[tokens], norm) for name in GUESS_NAMES}
                for i, tokens in places
            )
            return Metrics(tuple(igm), self._components(matrices, norm))

        return ImageMetrics(
            metrics={each: metrics(each, blocks) for each in NORMS},
            segment_metrics={i: metrics(norm, [(i, tokens) for tokens in segments], count=num_segments) for i in tough},
            class_metrics={label: metrics(norm, blocks, label) for label in self.classes},
        )

    def _components(self, matrices: Sequence[tuple[int, Tensor]], norm: Norm) -> tuple[Components, ...] | None:
        """Returns the components of CRM for pairs of a block and its mean of Sigma^-1 X, or `None` if not defined."""
        components = []
        for i, matrix in matrices:
            weights = self.flow.inverse_block(i).output_weights()
            if weights is None:
                return None
            scale, shift = (0.0 if weight is None else matrix_norm(weight, norm) for weight in weights)
            components.append(Components(matrix_norm(matrix, norm), scale, shift))
        return tuple(components)

    def _mean_residuals(self, means: ImageMeans, tough: Sequence[int], num_segments: int) -> _Means:
        """Averages the residuals of each guess over the images, under (block, guess, number of segments)."""
        guesses = list(map(guesses_by_name, means.mean_affine))

        def add(residuals: _Means, tokens: Tensor, context: Context) -> None:
            for i, x, _, _, z in self._encode(tokens, context):
                for count in {1, num_segments} if i in tough else {1}:
                    for name, guess in guesses[i].items():
                        values = initial_residuals(self.flow.inverse_block(i), x, z, guess, context, count)
                        residuals.add((i, name, count), values, context.values)

        return self._means(add, "metrics")

    def _means(self, add: Callable[[_Means, Tensor, Context], None], what: str) -> _Means:
        """Returns means over all images; `add` adds those of a batch to them.

        The sums of chunks of images are added in a fixed order, so that they do not depend on the number of processes.
        """
        batches = torch.arange(len(self.images)).split(self.batch_size)
        size = -(-len(batches) // _MAX_CHUNKS)
        chunks = [batches[start : start + size] for start in range(0, len(batches), size)]

        def measure(place: int) -> _Means:
            means = _Means(self._groups)
            for tokens, context in self._batches(chunks[place]):
                add(means, tokens, context)
            if self.progress is not None:
                self.progress(place + 1, len(chunks), what)
            return means

        means = _Means(self._groups)
        for each in self.processes.map(measure, range(len(chunks))):
            means.merge(each)
        return means

    def image_solutions(self, index: Int[Tensor, " m"]) -> list[BlockSolution]:
        """Encodes the images at `index`: per block X*, and the z that it encodes to."""
        batches = [list(self._encode(*batch)) for batch in self._batches(index.split(self.batch_size))]
        context = self.context_at(index)
        return [
            BlockSolution(torch.cat([step.x for step in steps]), torch.cat([step.z for step in steps]), context)
            for steps in zip(*batches, strict=True)
        ]

    def context_at(self, index: Int[Tensor, " m"]) -> Context:
        """Returns the context at `index`, on the flow's device."""
        return self.context[index.to(self.flow.var.device)]

    def _batches(self, batches: Iterable[Int[Tensor, " b"]]) -> Iterator[tuple[Tensor, Context]]:
        """Yields tokens in raster order, and the context, of the images at each index, on the flow's device."""
        for index in batches:
            tokens = self.flow.to_tokens(self.read(index).to(self.flow.var.device, self.flow.state_dtype))
            yield tokens, self.context_at(index)

    def _encode(self, x: Tensor, context: Context) -> Iterator[Step]:
        """Yields the steps of the encoding; under guidance, with guided parameters and the z that they encode to."""
        for step in self.flow.encode_steps(x, context, lambda i, x: _affine(self.flow.block(i), x, context)):
            if not torch.isfinite(step.z).all():
                raise InputValueError(
                    f"images overflow in block {step.block} when they are encoded; are they in [-1, 1]?"
                )
            if self.flow.guidance:
                log_scale, shift = _affine(self.flow.inverse_block(step.block), step.x, context)
                step = Step(step.block, step.x, log_scale, shift, (step.x - shift) * torch.exp(-log_scale))
            yield step


def _affine(block: AffineBlock, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    with no_gradients(block):
        log_scale, shift = block.affine_whole(x, context)
    return log_scale.clone(), shift.clone()
