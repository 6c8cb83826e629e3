"""Passes over calibration images: means, metrics and solutions of the blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.blocks.base import AffineBlock, no_gradients
from jacobiflow.blocks.context import Context
from jacobiflow.blocks.tokens import Tokens
from jacobiflow.calibration.convergence import initial_residuals, segment_slices
from jacobiflow.calibration.metrics import Components, Metrics, Norm, matrix_norm, tough_blocks
from jacobiflow.calibration.report import GUESSES
from jacobiflow.calibration.solutions import BlockSolution
from jacobiflow.errors import InputValueError
from jacobiflow.models.flow import Flow
from jacobiflow.utils.checks import check_finite

Means = Mapping[str, Tensor]  # means over images by name, see `CalibrationStatistics`

_ALL = "all"  # The group of all images.
_MAX_CHUNKS = 32  # Number of chunks of the images, each of which is a unit of work.


class Step(NamedTuple):
    """The step of a block in an encoding pass: z is what x encodes to, in the block's causal order."""

    block: int
    x: Tokens
    log_scale: Tokens
    z: Tokens
    context: Context


class ImageSet(Protocol):
    """Images that a tensor of indices can index: a tensor (N, C, H, W), or a data set on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Int[Tensor, " b"], /) -> Float[Tensor, "b c h w"]: ...


class CalibrationStatistics:
    """A flow's statistics over images, measured in batches.

    Sums over chunks of the images have names such as "0.scaled.all": the block, the values, and the group of images,
    "all" or a class. Means have the names of their sums.

    Args:
        flow: The model. Under guidance its guided maps are measured, but the images are encoded without guidance.
        images: Two or more images.
        context: Context of each image.
        classes: Classes that have statistics of their own.
        batch_size: Images in memory at a time.
    """

    def __init__(self, flow: Flow, images: ImageSet, context: Context, classes: Sequence[int], batch_size: int) -> None:
        self.flow, self.images, self.classes, self.batch_size = flow, images, classes, batch_size
        self.blocks, self.context = range(flow.config.num_blocks), context.to(flow.var.device)
        batches = torch.arange(len(images), device="cpu").split(batch_size)
        size = -(-len(batches) // _MAX_CHUNKS)
        self.chunks = [batches[start : start + size] for start in range(0, len(batches), size)]

    def read(self, index: Int[Tensor, " m"]) -> Float[Tensor, "m c h w"]:
        """Returns the images at `index`."""
        # NumPy takes a tensor of one index for a number, and would leave out the first axis.
        rows = self.images[index.numpy()] if isinstance(self.images, np.ndarray) else self.images[index]
        images = (rows if isinstance(rows, Tensor) else torch.as_tensor(rows, device="cpu")).detach()
        self.flow.check_data(images, "images")
        check_finite("images", images)
        return images

    def sum_parameters(self, chunk: int) -> dict[str, Tensor]:
        """Sums Sigma^-1 X, "scaled", over a chunk of the images."""
        sums = dict[str, Tensor]()
        for index in self.chunks[chunk]:
            for step in self._encode(index):
                self._add(sums, f"{step.block}.scaled", torch.exp(-step.log_scale) * step.x, step.context.values)
        return sums

    def sum_residuals(self, chunk: int, means: Means, num_segments: int, norm: Norm) -> dict[str, Tensor]:
        """Sums, over a chunk of the images, the residuals of each guess; of tough blocks also those in segments."""
        tough, sums = self.tough_blocks(means, norm), dict[str, Tensor]()
        for index in self.chunks[chunk]:
            for i, x, _, z, context in self._encode(index):
                for count in {1, num_segments} if i in tough else {1}:
                    for name, guess in GUESSES.items():
                        values = initial_residuals(self.flow.inverse_block(i), x, z, guess, context, count)
                        self._add(sums, f"{i}.{name}-{count}", values, context.values)
        return sums

    def _add(self, sums: dict[str, Tensor], name: str, values: Tensor, labels: Tensor | None) -> None:
        """Adds rows to the sums over all images; with labels, also to those over each class."""
        for group in (_ALL, *self.classes) if labels is not None else (_ALL,):
            rows = values if group == _ALL else values[labels == group]
            if len(rows):
                key = f"{name}.{group}"
                sums[key] = sums.get(key, 0) + rows.double().sum(dim=0).cpu()

    def means(self, chunks: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Returns the means from the sums of all chunks, added in their order."""
        totals = dict[str, Tensor]()
        for sums in chunks:
            for name, value in sums.items():
                totals[name] = totals.get(name, 0) + value
        return {name: total / self._num_images(name.rpartition(".")[2]) for name, total in totals.items()}

    def _num_images(self, group: str) -> int:
        if group == _ALL or self.context.values is None:
            return len(self.images)
        return int((self.context.values == int(group)).sum())

    def tough_blocks(self, means: Means, norm: Norm) -> tuple[int, ...]:
        """Returns the tough blocks by the means of parameters; none if CRM is not defined."""
        components = self._components(means, norm, [(i, slice(None)) for i in self.blocks])
        return tough_blocks([each.crm for each in components or ()])

    def metrics(
        self, means: Means, norm: Norm, blocks: Sequence[int], num_segments: int = 1, group: int | str = _ALL
    ) -> Metrics:
        """Returns IGM and CRM of each segment of some blocks by the means over a group of images."""
        segments = segment_slices(self.flow.config.num_tokens, num_segments)
        places = [(i, tokens) for i in blocks for tokens in segments]
        igm = (
            {name: matrix_norm(means[f"{i}.{name}-{num_segments}.{group}"][tokens], norm) for name in GUESSES}
            for i, tokens in places
        )
        return Metrics(tuple(igm), self._components(means, norm, places, group))

    def _components(
        self, means: Means, norm: Norm, places: Sequence[tuple[int, slice]], group: int | str = _ALL
    ) -> tuple[Components, ...] | None:
        """Returns the components of CRM for tokens of blocks, or `None` if CRM is not defined."""
        components = []
        for i, tokens in places:
            weights = self.flow.inverse_block(i).output_weights()
            if weights is None:
                return None
            scale, shift = (0.0 if weight is None else matrix_norm(weight, norm) for weight in weights)
            components.append(Components(matrix_norm(means[f"{i}.scaled.{group}"][tokens], norm), scale, shift))
        return tuple(components)

    def image_solutions(self, index: Int[Tensor, " m"]) -> list[BlockSolution]:
        """Encodes the images at `index`: per block X*, and the z that it encodes to."""
        batches = [list(self._encode(rows)) for rows in index.split(self.batch_size)]
        context = self.context_at(index)
        return [
            BlockSolution(torch.cat([step.x for step in steps]), torch.cat([step.z for step in steps]), context)
            for steps in zip(*batches, strict=True)
        ]

    def context_at(self, index: Int[Tensor, " m"]) -> Context:
        """Returns the context at `index`, on the flow's device."""
        return self.context[index.to(self.flow.var.device)]

    def _encode(self, index: Int[Tensor, " b"]) -> Iterator[Step]:
        """Yields the steps that encode images; under guidance, with guided parameters and the z that they encode to."""
        x = self.flow.to_tokens(self.read(index).to(self.flow.var.device, self.flow.state_dtype))
        context = self.context_at(index)
        for i, block in enumerate(self.flow.blocks):
            x = block.permutation(x)
            log_scale, shift = _log_scale_and_shift(self.flow.block(i), x, context)
            z = (x - shift) * torch.exp(-log_scale)
            if not torch.isfinite(z).all():
                raise InputValueError(f"images overflow in block {i} when they are encoded; are they in [-1, 1]?")
            step = Step(i, x, log_scale, z, context)
            if self.flow.guidance:
                log_scale, shift = _log_scale_and_shift(self.flow.inverse_block(i), x, context)
                step = Step(i, x, log_scale, (x - shift) * torch.exp(-log_scale), context)
            yield step
            x = block.permutation.inverse(z)


def _log_scale_and_shift(block: AffineBlock, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    with no_gradients(block):
        log_scale, shift = block.affine_whole(x, context)
    return log_scale.clone(), shift.clone()
