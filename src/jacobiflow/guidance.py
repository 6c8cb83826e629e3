"""Classifier-free guidance as a wrapper round a block."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.checks import check_kind
from jacobiflow.flows.base import (
    AffineBlock,
    AffineFrontPerSample,
    ExactInverse,
    Extrapolation,
    KeepsNothing,
    LowPrecision,
)
from jacobiflow.flows.settings import Guidance

__all__ = ["Guidance", "GuidedBlock", "GuidedCache", "check_guidance", "guided", "in_force"]


class GuidedCache(NamedTuple):
    """The wrapped block's cache, of the conditional rows and then the unconditional ones.

    `rows` are the indices 0 .. B-1 of the conditional rows, on the cache's device, as are the weights of
    `extrapolation`.
    """

    inner: Any
    rows: Int[Tensor, " b"]
    extrapolation: Extrapolation


@dataclass(frozen=True)
class GuidedBlock(AffineBlock):
    """`block` under guidance: conditional and unconditional rows go through the network as one batch.

    Made by `guided`, which adds what else the wrapped block can do.
    """

    block: AffineBlock
    guidance: Guidance

    def init_cache(
        self,
        z: Float[Tensor, "b t c"],
        context: Int[Tensor, " b"] | None = None,
        attn_temperature: Float[Tensor, " b"] | None = None,
    ) -> GuidedCache:
        """That of the wrapped block for twice the rows of `z`: under labels `context`, then without."""
        if attn_temperature is not None:
            raise ValueError("attn_temperature: a guided block takes it from its guidance")
        temperature = None
        if self.guidance.attn_temperature != 1:
            rows = z.new_ones(len(z))
            temperature = torch.cat((rows, rows * self.guidance.attn_temperature))
        labels = None if context is None else torch.cat((context, torch.full_like(context, -1)))
        inner = self.block.init_cache(torch.cat((z, z)), labels, temperature)
        return GuidedCache(inner, torch.arange(len(z), device=z.device), self.guidance.extrapolation(z))

    def affine(
        self, x: Float[Tensor, "b t c"], start: int, stop: int, cache: GuidedCache
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n c"]]:
        """The guided log-scale and shift; see `AffineBlock.affine`."""
        both = self.block.affine(torch.cat((x, x)), start, stop, cache.inner)
        return _extrapolate(both, cache.extrapolation, slice(start, stop))

    def output_weights(self) -> tuple[Float[Tensor, "o d"] | None, Float[Tensor, "o d"]] | None:
        """Those of the wrapped block."""
        return self.block.output_weights()


class _GuidedFront(GuidedBlock, AffineFrontPerSample):
    """With a front per sample, at which both rows of the sample stand."""

    block: AffineFrontPerSample

    def affine_at(
        self, x: Float[Tensor, "b t c"], start: Int[Tensor, " b"], size: int, end: int, cache: GuidedCache
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n c"]]:
        both = self.block.affine_at(torch.cat((x, x)), torch.cat((start, start)), size, end, cache.inner)
        return _extrapolate(both, cache.extrapolation, start.view(-1, 1) + torch.arange(size, device=x.device))

    def take(self, cache: GuidedCache, rows: Int[Tensor, " m"]) -> GuidedCache:
        both = torch.cat((rows, rows + len(cache.rows)))
        inner = self.block.take(cache.inner, both)
        return cache._replace(inner=inner, rows=torch.arange(len(rows), device=rows.device))

    def join(self, caches: Sequence[GuidedCache]) -> GuidedCache:
        conditional = [self.block.take(cache.inner, cache.rows) for cache in caches]
        unconditional = [self.block.take(cache.inner, cache.rows + len(cache.rows)) for cache in caches]
        num = sum(len(cache.rows) for cache in caches)
        rows = torch.arange(num, device=caches[0].rows.device)
        return caches[0]._replace(inner=self.block.join([*conditional, *unconditional]), rows=rows)


class _GuidedLow(GuidedBlock, LowPrecision):
    """With a network in bfloat16."""

    def lower(self, cache: GuidedCache) -> GuidedCache:
        return cache._replace(inner=cast(LowPrecision, self.block).lower(cache.inner))


class _GuidedExact(GuidedBlock, ExactInverse):
    """With a recurrence of its own."""

    def exact_inverse(
        self, z: Float[Tensor, "b t c"], context: Tensor | None = None, extrapolation: Extrapolation | None = None
    ) -> Float[Tensor, "b t c"] | None:
        return cast(ExactInverse, self.block).exact_inverse(z, context, self.guidance.extrapolation(z))


class _GuidedKeepsNothing(GuidedBlock, KeepsNothing):
    """With nothing kept between calls."""


_GUIDED: dict[type, type[GuidedBlock]] = {
    AffineFrontPerSample: _GuidedFront,
    LowPrecision: _GuidedLow,
    ExactInverse: _GuidedExact,
    KeepsNothing: _GuidedKeepsNothing,
}


@functools.cache
def _guided_class(*capabilities: type) -> type[GuidedBlock]:
    """A `GuidedBlock` with the `capabilities`, so that a solver finds at it what it finds at the wrapped block."""
    return type("GuidedBlock", (*(_GUIDED[capability] for capability in capabilities), GuidedBlock), {})


def check_guidance(guidance: Any) -> None:
    """**Raises** `TypeError` where `guidance` is neither a `Guidance` nor `None`."""
    check_kind("guidance", guidance, Guidance | None, "a Guidance, such as Guidance(1.5), or None")


def in_force(guidance: Guidance | None) -> Guidance | None:
    """`guidance`, or `None` where its weight is 0."""
    return None if guidance is None or guidance.weight == 0 else guidance


def guided(block: AffineBlock, guidance: Guidance | None) -> AffineBlock:
    """`block` under `guidance`, with all that `block` can do; the block itself where guidance is off."""
    check_guidance(guidance)
    check_kind("block", block, AffineBlock, "an AffineBlock, such as flow.blocks[0]")
    guidance = in_force(guidance)
    if guidance is None:
        return block
    return _guided_class(*(capability for capability in _GUIDED if isinstance(block, capability)))(block, guidance)


def _extrapolate(
    both: tuple[Tensor, Tensor], extrapolation: Extrapolation, entries: slice | Int[Tensor, "b n"]
) -> tuple[Tensor, Tensor]:
    """The parameters of `entries`, of which `both` have the conditional rows and then the unconditional ones."""
    log_scale, shift = (parameters.chunk(2) for parameters in both)
    return (
        log_scale[0] + extrapolation.log_scale[entries].unsqueeze(-1) * (log_scale[0] - log_scale[1]),
        shift[0] + extrapolation.shift[entries].unsqueeze(-1) * (shift[0] - shift[1]),
    )
