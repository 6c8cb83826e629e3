"""Classifier-free guidance, as a value and as a wrapper round a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.blocks.base import AffineBlock, AttentionBlock, ScaleShift, TokensLogDet
from jacobiflow.blocks.context import NO_CONTEXT, Context, GuidedRows
from jacobiflow.blocks.tokens import Tokens
from jacobiflow.errors import InputValueError
from jacobiflow.utils.checks import check_choice, check_fields, check_kind, check_number, check_positive, format_value


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of the parameters of blocks: of all, or of those that read a text.

    By the linear rule, entry t (from 0) gets `log_scale + w_t (log_scale - log_scale_uncond)`, and the same for the
    shift (TarFlow, arXiv 2412.06329, section 3). By the rule "density", STARFlow's, the entry is drawn from the
    Gaussian proportional to p^(1 + w_t) / p_uncond^w_t; a p_uncond that is narrower than p is taken as wide as p. The
    unconditional row has no label or an empty text, and its attention logits are divided by `attn_temperature`.

    Args:
        weight: w_t; 0 turns guidance off.
        annealed: If true, w_t = weight * t / (T - 1).
        on: The parameters that are guided by the linear rule: "both", "scale" or "shift".
        attn_temperature: Divides the attention logits of the unconditional row.
        rule: "linear" (TarFlow) or "density" (STARFlow).

    Example:
        >>> flow = jf.load("digits-p1").guided(jf.Guidance(1.5))
        >>> jf.sample(flow, 2, labels=[3, 7]).images.shape
        torch.Size([2, 1, 8, 8])
    """

    weight: float
    annealed: bool = True
    on: Literal["both", "scale", "shift"] = "both"
    attn_temperature: float = 1.0
    rule: Literal["linear", "density"] = "linear"

    def __post_init__(self) -> None:
        check_number("guidance weight", self.weight, expected="0 (off) or a positive number")
        check_choice("guidance on", self.on, ("both", "scale", "shift"))
        check_positive("attn_temperature", self.attn_temperature)
        check_choice("guidance rule", self.rule, ("linear", "density"))
        if self.rule == "density" and self.on != "both":
            raise InputValueError(f"guidance on={self.on}: the rule density is for both; leave it out")
        check_fields(self)

    @classmethod
    def parse(cls, text: str) -> Guidance:
        """Reads guidance from text, the inverse of `str`.

        The text is a weight, then after commas any of `attn_temperature=1.2`, `annealed=false`, `on=scale`, `on=shift`,
        `rule=density`.

        Example:
            >>> jf.Guidance.parse("4,attn_temperature=1.2")
            Guidance(weight=4.0, annealed=True, on='both', attn_temperature=1.2, rule='linear')
        """
        weight, *options = (part.strip() for part in text.split(","))
        booleans = {"true": True, "false": False}
        parsers: Any = {"attn_temperature": float, "annealed": booleans.__getitem__, "on": str, "rule": str}
        try:
            number, pairs = float(weight), [option.split("=") for option in options]
            settings = {name: parsers.pop(name)(value) for name, value in pairs}  # each of them once
        except (KeyError, ValueError):
            raise InputValueError(
                f"guidance {format_value(text)}: give a weight, such as 3, and options after commas: "
                "attn_temperature=1.2, annealed=false, on=scale, on=shift, rule=density"
            ) from None
        return cls(number, **settings)

    def __str__(self) -> str:
        """The text that `parse` reads: the weight, and what is not as by default."""
        options = {
            "attn_temperature": "" if self.attn_temperature == 1 else _number(self.attn_temperature),
            "annealed": "" if self.annealed else "false",
            "on": "" if self.on == "both" else self.on,
            "rule": "" if self.rule == "linear" else self.rule,
        }
        return ",".join([_number(self.weight), *(f"{name}={value}" for name, value in options.items() if value)])

    def weights(self, z: Tokens) -> tuple[Float[Tensor, " t"], Float[Tensor, " t"]]:
        """Returns w_t of the log-scale and of the shift, in the dtype and on the device of `z`."""
        weights = z.new_full((z.shape[1],), min(self.weight, torch.finfo(z.dtype).max))
        if self.annealed:
            weights *= torch.arange(z.shape[1], device=z.device).to(z.dtype) / max(z.shape[1] - 1, 1)
        zeros = torch.zeros_like(weights)
        return zeros if self.on == "shift" else weights, zeros if self.on == "scale" else weights


GIVE_GUIDANCE = "a Guidance, such as Guidance(1.5), or None"


def _number(value: float) -> str:
    return repr(float(value)).removesuffix(".0")


DenoiseDtype = Literal["bfloat16"] | None
"""The dtype of the networks in a denoising step; `None` for that of the flow."""


@dataclass(frozen=True)
class SamplingSettings:
    """Guidance, and the rate (0: none) and dtype of one denoising step, as `jf.sample` takes them.

    Example:
        >>> jf.load("digits-p1").recommended
        SamplingSettings(guidance=None, denoise=1.0, denoise_dtype=None)
    """

    guidance: Guidance | None = None
    denoise: float = 0.0
    denoise_dtype: DenoiseDtype = None

    def __post_init__(self) -> None:
        check_kind("guidance", self.guidance, Guidance | None, GIVE_GUIDANCE)
        check_number("denoise", self.denoise, expected="0 (off) or a positive rate")
        check_choice("denoise_dtype", self.denoise_dtype, (None, "bfloat16"))
        check_fields(self)


GuidedWeights = tuple[Float[Tensor, "t 1"], Float[Tensor, "t 1"]]
"""1 + w of the log-scale and of the shift."""


class GuidedCache(NamedTuple):
    """The wrapped block's cache, of two rows for each sample, and the weights of guidance."""

    inner: Any
    weights: GuidedWeights


class GuidedBlock(AffineBlock):
    """A block under guidance: conditional and unconditional rows go through the network as one batch."""

    def __init__(self, block: AffineBlock, guidance: Guidance) -> None:
        if guidance.attn_temperature != 1 and not isinstance(block, AttentionBlock):
            raise InputValueError(
                f"attn_temperature={guidance.attn_temperature:g}: a {type(block).__name__} has no attention; leave it "
                "at 1"
            )
        self.block, self.guidance, self.is_pure = block, guidance, block.is_pure

    def init_cache(self, z: Tokens, context: Context = NO_CONTEXT) -> GuidedCache:
        return GuidedCache(self.block.init_cache(_twice(z), self._both(context, len(z), z)), self._weights(z))

    def affine(self, x: Tokens, start: int, stop: int, cache: GuidedCache) -> ScaleShift:
        both = self.block.affine(_twice(x), start, stop, cache.inner)
        return self._combine(both, cache.weights, slice(start, stop))

    def affine_whole(self, x: Tokens, context: Context = NO_CONTEXT) -> ScaleShift:
        both = self.block.affine_whole(_twice(x), self._both(context, len(x), x))
        return self._combine(both, self._weights(x), slice(None))

    def sequential_inverse(
        self, z: Tokens, context: Context = NO_CONTEXT, batch_size: int | None = None
    ) -> TokensLogDet:
        contexts = self._contexts(context, len(z), z)
        rows = GuidedRows(*contexts, self.guidance.weights(z), self.guidance.rule)
        return self.block.guided_inverse(z, rows, batch_size)

    def output_weights(self) -> tuple[Float[Tensor, "o d"] | None, Float[Tensor, "o d"]] | None:
        return self.block.output_weights()

    def _contexts(self, context: Context, num: int, like: Tensor) -> tuple[Context, Context]:
        """Returns the contexts of the conditional and of the unconditional row of each of `num` samples."""
        values, temperature = context.values, context.temperature
        free = None if values is None else self.block.unconditional(values)
        if temperature is None and self.guidance.attn_temperature == 1:
            return context, Context(free)
        temperature = like.new_ones(num) if temperature is None else temperature.to(like)
        return Context(values, temperature), Context(free, like.new_full((num,), self.guidance.attn_temperature))

    def _both(self, context: Context, num: int, like: Tensor) -> Context:
        """Returns the context of both rows of each sample, one after the other."""
        conditional, unconditional = self._contexts(context, num, like)
        return conditional.interleaved(unconditional)

    def _weights(self, z: Tokens) -> GuidedWeights:
        log_scale, shift = self.guidance.weights(z)
        return 1 + log_scale.unsqueeze(-1), 1 + shift.unsqueeze(-1)

    def _combine(self, both: ScaleShift, weights: GuidedWeights, entries: slice | Int[Tensor, "b n"]) -> ScaleShift:
        """Returns the guided parameters of `entries`; `both` has a conditional and an unconditional row per sample.

        The linear rule p + w (p - p_unconditional) interpolates from p_unconditional to p with weight 1 + w.
        """
        (scale, plain_scale), (shift, plain_shift) = (rows.unflatten(0, (-1, 2)).unbind(1) for rows in both)
        of_scale, of_shift = (values[entries].to(scale.dtype) for values in weights)
        if self.guidance.rule == "linear":
            return torch.lerp(plain_scale, scale, of_scale), torch.lerp(plain_shift, shift, of_shift)
        variance_ratio = torch.exp(2 * (scale - plain_scale).clamp(max=0))
        # 1 + w - w variance_ratio
        precision = torch.lerp(variance_ratio, torch.ones_like(variance_ratio), of_scale).clamp(min=1)
        mean = (of_scale * shift - (of_scale - 1) * variance_ratio * plain_shift) / precision
        return scale - 0.5 * precision.log(), mean


class GuidedAttentionBlock(AttentionBlock, GuidedBlock):
    """A block with attention under guidance."""

    block: Any

    def affine_at(self, x: Tokens, start: Int[Tensor, " b"], size: int, end: int, cache: GuidedCache) -> ScaleShift:
        both = self.block.affine_at(_twice(x), _twice(start), size, end, cache.inner)
        return self._combine(both, cache.weights, start.view(-1, 1) + torch.arange(size, device=x.device))

    def move_rows(
        self, cache: GuidedCache, source: Int[Tensor, " m"], target: Int[Tensor, " m"], num: int
    ) -> GuidedCache:
        return cache._replace(inner=self.block.move_rows(cache.inner, _rows_of(source), _rows_of(target), 2 * num))

    def reset_rows(self, cache: GuidedCache, rows: Int[Tensor, " m"], context: Context = NO_CONTEXT) -> None:
        self.block.reset_rows(cache.inner, _rows_of(rows), self._both(context, len(rows), cache.weights[0]))

    def to_bf16(self, cache: GuidedCache) -> GuidedCache:
        return cache._replace(inner=self.block.to_bf16(cache.inner))


def guided(block: AffineBlock, guidance: Guidance | None) -> AffineBlock:
    """Returns `block` under `guidance`; the block itself if guidance is off, or does not apply to it."""
    if guidance is None or guidance.weight == 0 or not block.supports_guidance:
        return block
    return (GuidedAttentionBlock if isinstance(block, AttentionBlock) else GuidedBlock)(block, guidance)


def _twice(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=0)


def _rows_of(samples: Int[Tensor, " m"]) -> Int[Tensor, " m2"]:
    """Returns the two rows of each of the `samples`."""
    return torch.stack((2 * samples, 2 * samples + 1), dim=1).flatten()
