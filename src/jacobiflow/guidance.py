"""Classifier-free guidance as a wrapper round a block."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.checks import check_kind
from jacobiflow.errors import InputValueError
from jacobiflow.flows.base import (
    AffineBlock,
    AffineFrontPerSample,
    ExactInverse,
    Extrapolation,
    KeepsNothing,
    LowPrecision,
    Replayable,
)
from jacobiflow.flows.settings import Guidance

__all__ = ["Guidance", "GuidedBlock", "GuidedCache", "check_guidance", "guided", "in_force"]


class GuidedCache(NamedTuple):
    """The wrapped block's cache, of two rows for each sample: the conditional and the unconditional one.

    `weights` are 1 + w (T, 1) of log-scale and shift.
    """

    inner: Any
    weights: tuple[Float[Tensor, "t 1"], Float[Tensor, "t 1"]]


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
        _check_temperature(attn_temperature)
        labels, temperature = self._both(context, len(z), z)
        return GuidedCache(self.block.init_cache(_twice(z), labels, temperature), self._weights(z))

    def affine(
        self, x: Float[Tensor, "b t c"], start: int, stop: int, cache: GuidedCache
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n c"]]:
        """The guided log-scale and shift; see `AffineBlock.affine`."""
        both = self.block.affine(_twice(x), start, stop, cache.inner)
        return _extrapolate(both, cache.weights, slice(start, stop))

    def affine_whole(
        self,
        x: Float[Tensor, "b t c"],
        context: Int[Tensor, " b"] | None = None,
        attn_temperature: Float[Tensor, " b"] | None = None,
    ) -> tuple[Float[Tensor, "b t c"], Float[Tensor, "b t c"]]:
        """The guided log-scale and shift of all entries; see `AffineBlock.affine_whole`."""
        _check_temperature(attn_temperature)
        both = self.block.affine_whole(_twice(x), *self._both(context, len(x), x))
        return _extrapolate(both, self._weights(x), slice(None))

    def _both(self, context: Tensor | None, num: int, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Labels and attention temperatures of both rows of `num` samples, for `init_cache`."""
        labels = None if context is None else torch.stack((context, torch.full_like(context, -1)), dim=1).flatten()
        if self.guidance.attn_temperature == 1:
            return labels, None
        temperature = like.new_ones(num, 2)
        temperature[:, 1] = self.guidance.attn_temperature
        return labels, temperature.flatten()

    def _weights(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """1 + w of log-scale and shift (T, 1)."""
        weights = self.guidance.extrapolation(like)
        return 1 + weights.log_scale.unsqueeze(-1), 1 + weights.shift.unsqueeze(-1)

    def output_weights(self) -> tuple[Float[Tensor, "o d"] | None, Float[Tensor, "o d"]] | None:
        """Those of the wrapped block."""
        return self.block.output_weights()


class _GuidedFront(GuidedBlock, AffineFrontPerSample):
    """With a front per sample, at which both rows of the sample stand."""

    block: AffineFrontPerSample

    def affine_at(
        self, x: Float[Tensor, "b t c"], start: Int[Tensor, " b"], size: int, end: int, cache: GuidedCache
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n c"]]:
        both = self.block.affine_at(_twice(x), _twice(start), size, end, cache.inner)
        return _extrapolate(both, cache.weights, start.view(-1, 1) + torch.arange(size, device=x.device))

    def move(self, cache: GuidedCache, source: Int[Tensor, " m"], target: Int[Tensor, " m"], num: int) -> GuidedCache:
        inner = self.block.move(cache.inner, _rows_of(source), _rows_of(target), 2 * num)
        return cache._replace(inner=inner)

    def refill(
        self,
        cache: GuidedCache,
        rows: Int[Tensor, " m"],
        context: Int[Tensor, " m"] | None = None,
        attn_temperature: Float[Tensor, " m"] | None = None,
    ) -> None:
        _check_temperature(attn_temperature)
        both = self._both(context, len(rows), cache.weights[0])
        self.block.refill(cache.inner, _rows_of(rows), *both)


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


class _GuidedReplayable(GuidedBlock, Replayable):
    """With kernels that do not depend on values."""


class _GuidedKeepsNothing(GuidedBlock, KeepsNothing):
    """With nothing kept between calls."""


_GUIDED: dict[type, type[GuidedBlock]] = {
    AffineFrontPerSample: _GuidedFront,
    LowPrecision: _GuidedLow,
    ExactInverse: _GuidedExact,
    Replayable: _GuidedReplayable,
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


def _check_temperature(attn_temperature: object) -> None:
    if attn_temperature is not None:
        raise InputValueError("attn_temperature: a guided block takes it from its guidance")


def _twice(x: Tensor) -> Tensor:
    """Every row twice, one after the other."""
    return x.repeat_interleave(2, dim=0)


def _rows_of(samples: Int[Tensor, " m"]) -> Int[Tensor, " m2"]:
    """The two rows of each of the `samples`."""
    return torch.stack((2 * samples, 2 * samples + 1), dim=1).flatten()


def _extrapolate(
    both: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor], entries: slice | Int[Tensor, "b n"]
) -> tuple[Tensor, Tensor]:
    """The parameters of `entries`, of which `both` have the conditional and the unconditional row of each sample.

    p + w (p - p_unconditional) is 1 + w of the way from p_unconditional to p.
    """
    (scale, plain_scale), (shift, plain_shift) = (rows.unflatten(0, (-1, 2)).unbind(1) for rows in both)
    return (
        torch.lerp(plain_scale, scale, weights[0][entries].to(scale.dtype)),
        torch.lerp(plain_shift, shift, weights[1][entries].to(shift.dtype)),
    )
