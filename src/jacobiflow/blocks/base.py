"""The protocol of a block: the fixed-point map g on any run of tokens against a cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jacobiflow.errors import InputValueError
from jacobiflow.utils.checks import FLOATS, check_choice, check_kind, format_value

Tokens = Float[Tensor, "b t c"]
"""Tokens of a batch: T for each of B samples, of C values."""

ScaleShift = tuple[Float[Tensor, "b n c"], Float[Tensor, "b n c"]]
"""Log-scale and shift of a run of entries."""


@dataclass(frozen=True)
class Permutation:
    """The order in which a block reads the tokens: as they are ("identity"), reversed ("flip"), or x[order[0]], ...

    Example:
        >>> from jacobiflow.models import Permutation
        >>> order = Permutation((2, 0, 1))
        >>> x = torch.tensor([[[5.0], [6.0], [7.0]]])
        >>> order(x).flatten().tolist(), torch.equal(order.inverse(order(x)), x)
        ([7.0, 5.0, 6.0], True)
    """

    order: Literal["identity", "flip"] | tuple[int, ...]

    def __post_init__(self) -> None:
        if isinstance(self.order, str):
            check_choice("order", self.order, ("identity", "flip"))
            return
        check_kind("order", self.order, tuple, '"identity", "flip" or a tuple of indices')
        if set(self.order) != set(range(len(self.order))):
            raise InputValueError(f"order={format_value(self.order)}: give each of 0 to {len(self.order) - 1} once")

    def __call__(self, x: Tensor, dim: int = 1) -> Tensor:
        if isinstance(self.order, str):
            return x.flip(dim) if self.order == "flip" else x
        return x.index_select(dim, torch.tensor(self.order, device=x.device))

    def inverse(self, x: Tensor, dim: int = 1) -> Tensor:
        """Returns the tokens in the order that they had before."""
        if isinstance(self.order, str):
            return self(x, dim)
        return x.index_select(dim, torch.tensor(self.order, device=x.device).argsort())


@runtime_checkable
class Block(Protocol):
    """An autoregressive map g whose fixed point x = g(x) is the inverse of a block at `z`.

    Entry t of g(x) depends on x[:, :t] only; the block itself owns that shift by one. Tokens `x` and `z` are
    (B, T, C) in the block's causal order. `AffineBlock` lists the flags and methods that any block may have besides.

    Example:
        >>> isinstance(jf.load("digits-p1").blocks[0], jf.Block)
        True
    """

    def init_cache(self, z: Tokens, context: Tensor | None = None) -> Any:
        """Returns a fresh cache, of any type, for solving the rows of `z` under `context` (one row each, or `None`)."""
        ...

    def update(self, x: Tokens, z: Tokens, start: int, stop: int, cache: Any) -> Float[Tensor, "b n c"]:
        """Returns g(x)[:, start:stop], given that the cache holds positions before start-1.

        Positions start-1 .. stop-2 are read from `x` and written to the cache in place; `x` and `z` are not changed.
        """
        ...


def supports(block: Any, flag: str) -> bool:
    """Tells if a flag of `AffineBlock` is set, for any block."""
    return bool(getattr(block, flag, False))


class AttentionContext(NamedTuple):
    """A context, and the temperatures that divide attention logits, for a guided block with `has_attention`."""

    context: Tensor | None
    temperature: Float[Tensor, " b"]

    @classmethod
    def of(cls, context: Tensor | AttentionContext | None) -> tuple[Tensor | None, Tensor | None]:
        """Returns the context and the temperatures of a context of either kind."""
        return context if isinstance(context, AttentionContext) else (context, None)


class AffineBlock(ABC):
    """A block whose map is affine in z: g(x) = exp(log_scale(x)) z + shift(x), eq. (3) of the GS-Jacobi paper.

    It needs `init_cache` and `affine`. The flags and the other methods are optional.

    Attributes:
        per_sample_front: The samples of a batch may each stand at a token of their own, leave and enter. The block
            defines `affine_at`, `move` and `refill`.
        graph_safe: With a front per sample, the block runs the same kernels whatever the values are, so that a GPU can
            capture them in a graph.
        inference_safe: The block keeps no tensor between calls, so that solvers may run it in inference mode, a tenth
            faster. A tensor from inference mode could not be trained with.
        has_bf16: The network can also run in bfloat16, on the same float32 state. The block defines `to_bf16`.
        has_attention: The context may be an `AttentionContext`.
        has_inverse_gradients: What `exact_inverse` returns has gradients in z, a context and the parameters.
        is_guided: Guidance applies to the block.

    Example:
        >>> log_scale, shift = jf.load("digits-p1").blocks[0].affine_whole(torch.zeros(2, 64, 1))
        >>> log_scale.shape
        torch.Size([2, 64, 1])
    """

    per_sample_front: bool = False
    graph_safe: bool = False
    inference_safe: bool = False
    has_bf16: bool = False
    has_attention: bool = False
    has_inverse_gradients: bool = False
    is_guided: bool = True

    @abstractmethod
    def init_cache(self, z: Tokens, context: Any = None) -> Any:
        """Returns a fresh cache; see `Block`."""

    @abstractmethod
    def affine(self, x: Tokens, start: int, stop: int, cache: Any) -> ScaleShift:
        """Returns log-scale and shift of entries start .. stop-1; reads and caches positions start-1 .. stop-2."""

    def affine_at(self, x: Tokens, start: Int[Tensor, " b"], size: int, end: int, cache: Any) -> ScaleShift:
        """Returns `affine` of entries start_b .. start_b + size - 1 in sample b; `end` is the largest of the stops."""
        raise NotImplementedError

    def affine_whole(self, x: Tokens, context: Any = None) -> ScaleShift:
        """Returns log-scale and shift of all entries; a block that needs no cache for it overrides this."""
        return self.affine(x, 0, x.shape[1], self.init_cache(x, context))

    def update(self, x: Tokens, z: Tokens, start: int, stop: int, cache: Any) -> Float[Tensor, "b n c"]:
        """Returns g(x)[:, start:stop]; see `Block`."""
        log_scale, shift = self.affine(x, start, stop, cache)
        return torch.addcmul(shift, log_scale.exp(), z[:, start:stop])

    def update_at(
        self, x: Tokens, z: Tokens, start: Int[Tensor, " b"], size: int, end: int,
        cache: Any,
    ) -> Float[Tensor, "b n c"]:  # fmt: skip
        """Returns `update` with a start per sample; see `affine_at`."""
        log_scale, shift = self.affine_at(x, start, size, end, cache)
        return torch.addcmul(shift, log_scale.exp(), run_of(z, start, size))

    def move(self, cache: Any, source: Int[Tensor, " m"], target: Int[Tensor, " m"], num: int) -> Any:
        """Returns the cache of `num` samples: rows `source` go to rows `target`, in place, and the first `num` stay."""
        raise NotImplementedError

    def refill(self, cache: Any, rows: Int[Tensor, " m"], context: Any = None) -> None:
        """Makes `rows` those of new samples under `context`, with an empty cache, in place."""
        raise NotImplementedError

    def unconditional(self, context: Tensor) -> Tensor:
        """Returns the context of the unconditional rows beside those of `context`; by default the label -1."""
        return torch.full_like(context, -1)

    def to_bf16(self, cache: Any) -> Any:
        """Returns a copy of the cache with which the network runs in bfloat16."""
        raise NotImplementedError

    def exact_inverse(
        self, z: Tokens, context: Any = None, guidance: Any = None
    ) -> tuple[Tokens, Float[Tensor, " b"]] | None:
        """Returns the x with x_t = g(x)_t by a recurrence of the block's own in one call, and the sum of log_scale(x).

        With a `Guidance` g is the guided block's. `None` if this block, device, dtype or installation has no such call.
        """
        return None

    def rounded_inverse(
        self, z: Tokens, context: Any = None, guidance: Any = None
    ) -> tuple[Tokens, Float[Tensor, " b"]] | None:
        """Returns what `exact_inverse` does, for weights rounded to 16-bit integers: they take half the bytes.

        `None` if the block has no such call, or if its weights have 16 bits already.
        """
        return None

    def output_weights(self) -> tuple[Float[Tensor, "o d"] | None, Float[Tensor, "o d"]] | None:
        """Returns W_s and W_u of the last layer, if `log_scale` = W_s h + b_s and `shift` = W_u h + b_u; else `None`.

        Their rows are channels if the layer acts on each token, and entries if it acts on all at once. W_s is `None` if
        the scale is fixed (volume-preserving).
        """
        return None


class FlowBlock(AffineBlock, nn.Module):
    """An affine block of a flow, called as `block(x, context)` for the log-scale and shift of all its entries.

    Tokens are in the block's own causal order; `permutation` takes the order of the data to it and back.
    """

    permutation: Permutation

    def forward(self, x: Tokens, context: Tensor | None = None) -> ScaleShift:
        """Returns `affine_whole`."""
        return self.affine_whole(x, context)

    def encode(self, x: Tokens, context: Tensor | None = None) -> tuple[Tokens, Float[Tensor, " b"]]:
        """Returns z = exp(-log_scale(x)) (x - shift(x)), and the sums of log_scale(x)."""
        log_scale, shift = self(x, context)
        return (x - shift) * torch.exp(-log_scale), log_scale.sum(dim=(1, 2))

    def row_bytes(self) -> int | None:
        """Returns the bytes of a row while it is solved, its cache and a sweep of all tokens; `None` if not known."""
        return None

    def copy_bytes(self) -> int:
        """Returns the bytes of the copy of its weights that `exact_inverse` makes, at most."""
        return 0


def evaluate(block: Block, x: Tokens, z: Tokens, context: Tensor | None = None) -> tuple[Tokens, Float[Tensor, " b"]]:
    """Returns g(x), all entries at once, and the sums of log_scale(x), which are NaN for a block that is not affine."""
    if isinstance(block, AffineBlock):
        log_scale, shift = block.affine_whole(x, context)
        return torch.addcmul(shift, log_scale.exp(), z), log_scale.sum(dim=(1, 2))
    g = block.update(x, z, 0, z.shape[1], block.init_cache(z, context))
    return g, z.new_full((len(z),), torch.nan)


def no_gradients(block: Any) -> AbstractContextManager[None]:
    """Returns inference mode for a block that is `inference_safe`, else `torch.no_grad`."""
    return torch.inference_mode() if supports(block, "inference_safe") else torch.no_grad()


def run_of(x: Tokens, start: int | Int[Tensor, " b"], size: int) -> Float[Tensor, "b n c"]:
    """Returns x[b, start_b : start_b + size] for every sample b; a view if `start` is common to all."""
    if isinstance(start, int):
        return x[:, start : start + size]
    return x.gather(1, _places(start, size, x.shape[2]))


def put_run(x: Tokens, run: Float[Tensor, "b n c"], start: int | Int[Tensor, " b"]) -> None:
    """Writes the entries that `run_of` reads, in place."""
    if isinstance(start, int):
        x[:, start : start + run.shape[1]] = run
    else:
        x.scatter_(1, _places(start, run.shape[1], x.shape[2]), run)


def _places(start: Int[Tensor, " b"], size: int, channels: int) -> Int[Tensor, "b n c"]:
    places = start.view(-1, 1) + torch.arange(size, device=start.device)
    return places.unsqueeze(-1).expand(-1, -1, channels)


def check_context(context: Any, num_tokens: int, channels: int) -> None:
    """Checks that a context is numbers (B, K) or (B, T, K)."""
    give = f"floating-point numbers (B, {channels}), or (B, {num_tokens}, {channels}) with a row for each token"
    check_kind("context", context, Tensor, give)
    if context.dtype not in FLOATS or tuple(context.shape[1:]) not in ((channels,), (num_tokens, channels)):
        raise InputValueError(f"context={format_value(context)}: give {give}")


def check_input(z: Tokens, num_tokens: int, token_channels: int) -> None:
    """Checks that `z` is (B, T, C)."""
    if z.ndim != 3 or z.shape[1:] != (num_tokens, token_channels):
        raise InputValueError(f"z={format_value(z)}: this block takes (B, {num_tokens}, {token_channels})")
