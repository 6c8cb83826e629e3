"""Classifier-free guidance as a wrapper round a block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.flows.base import AffineBlock


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of every block's parameters.

    Entry t (from 0) gets `log_scale + w_t (log_scale - log_scale_uncond)`, and the same for the shift, where the
    unconditional row has no label and attention logits divided by `attn_temperature`. `w_t` is `weight`, or with
    `annealed` it is `weight * t / (T - 1)`. `on` names the parameters that are guided.

    An unconditional flow is guided too, away from itself at another temperature.

    Reference: section 3 and the guidance of the original sampler of TarFlow, arXiv 2412.06329.
    """

    weight: float
    annealed: bool = True
    on: Literal["both", "scale", "shift"] = "both"
    attn_temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"guidance weight {self.weight}: give 0 (off) or a positive number")
        if not 0 < self.attn_temperature < math.inf:
            raise ValueError(f"attn_temperature {self.attn_temperature}: give a positive number")
        if self.on not in ("both", "scale", "shift"):
            raise ValueError(f"guidance on {self.on!r}: give 'both', 'scale' or 'shift'")


class GuidedCache(NamedTuple):
    """The wrapped block's cache, of the conditional rows and then the unconditional ones of so many samples."""

    inner: Any
    samples: int


@dataclass(frozen=True)
class GuidedBlock(AffineBlock):
    """`block` under guidance: conditional and unconditional rows go through the network as one batch."""

    block: AffineBlock
    guidance: Guidance

    @property
    def ragged(self) -> bool:  # type: ignore[override]
        """As the wrapped block."""
        return self.block.ragged

    @property
    def low_precision(self) -> bool:  # type: ignore[override]
        """As the wrapped block."""
        return self.block.low_precision

    @property
    def keeps_nothing(self) -> bool:
        """Whether the wrapped block says that it keeps no tensor; see `jacobiflow.solvers.solve.no_gradients`."""
        return getattr(self.block, "keeps_nothing", False)

    def init_cache(
        self,
        z: Float[Tensor, "b t c"],
        context: Int[Tensor, " b"] | None = None,
        attn_temperature: Float[Tensor, " b"] | None = None,
    ) -> GuidedCache:
        if attn_temperature is not None:
            raise ValueError("attn_temperature: a guided block takes it from its guidance")
        rows = z.new_ones(z.shape[0])
        temperature = torch.cat((rows, rows * self.guidance.attn_temperature))
        labels = None if context is None else torch.cat((context, torch.full_like(context, -1)))
        inner = self.block.init_cache(
            torch.cat((z, z)), labels, None if self.guidance.attn_temperature == 1 else temperature
        )
        return GuidedCache(inner, len(z))

    def output_weights(self) -> tuple[Float[Tensor, "o d"] | None, Float[Tensor, "o d"]] | None:
        """Those of the wrapped block."""
        return self.block.output_weights()

    def affine(
        self, x: Float[Tensor, "b t c"], start: int, stop: int, cache: GuidedCache
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n c"]]:
        both = self.block.affine(torch.cat((x, x)), start, stop, cache.inner)
        return self._extrapolate(both, x, torch.arange(start, stop, device=x.device).view(1, -1))

    def affine_at(
        self, x: Float[Tensor, "b t c"], start: Int[Tensor, " b"], size: int, end: int, cache: GuidedCache
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n c"]]:
        both = self.block.affine_at(torch.cat((x, x)), torch.cat((start, start)), size, end, cache.inner)
        return self._extrapolate(both, x, start.view(-1, 1) + torch.arange(size, device=x.device))

    def take(self, cache: GuidedCache, rows: Int[Tensor, " m"]) -> GuidedCache:
        """The cache of the samples `rows`, both rows of each."""
        both = torch.cat((rows, rows + cache.samples))
        return GuidedCache(self.block.take(cache.inner, both), len(rows))

    def join(self, caches: Sequence[GuidedCache]) -> GuidedCache:
        """One cache for the samples of all, conditional rows first."""
        halves = [
            self.block.take(cache.inner, torch.arange(cache.samples) + first)
            for conditional in (True, False)
            for cache in caches
            for first in [0 if conditional else cache.samples]
        ]
        return GuidedCache(self.block.join(halves), sum(cache.samples for cache in caches))

    def lower(self, cache: GuidedCache) -> GuidedCache:
        """The cache with which the wrapped block's network runs in bfloat16."""
        return GuidedCache(self.block.lower(cache.inner), cache.samples)

    def _extrapolate(
        self, both: tuple[Tensor, Tensor], x: Tensor, position: Int[Tensor, "#b n"]
    ) -> tuple[Tensor, Tensor]:
        """Parameters that move away from the unconditional ones, as far as the weight at `position` says."""
        weight: float | Tensor = self.guidance.weight
        if self.guidance.annealed:
            weight = weight * position.to(x.dtype).div(max(x.shape[1] - 1, 1)).unsqueeze(-1)
        on = self.guidance.on
        return (
            _extrapolate(both[0], weight if on != "shift" else 0.0),
            _extrapolate(both[1], weight if on != "scale" else 0.0),
        )


def in_force(guidance: Guidance | None) -> Guidance | None:
    """`guidance`, or `None` where its weight is 0."""
    return None if guidance is None or guidance.weight == 0 else guidance


def guided(block: AffineBlock, guidance: Guidance | None) -> AffineBlock:
    """`block` under `guidance`; the block itself where that is not in force."""
    guidance = in_force(guidance)
    return block if guidance is None else GuidedBlock(block, guidance)


def _extrapolate(both: Tensor, weight: float | Tensor) -> Tensor:
    conditional, unconditional = both.chunk(2)
    return conditional + weight * (conditional - unconditional)
