"""What a solver asks of a block: the fixed-point map g, evaluated on any run of tokens against a cache.

What else a block can do it declares by type: solvers ask `isinstance(block, FrontPerSample)`, and so on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jacobiflow.checks import check_rows, short
from jacobiflow.errors import InputValueError
from jacobiflow.flows.permutation import Permutation


@runtime_checkable
class Block(Protocol):
    """An autoregressive map g whose fixed point x = g(x) is the inverse of a block at `z`.

    Entry t of g(x) depends on x[:, :t] only; the block itself owns that shift by one. Tokens `x` and `z` are
    (B, T, C) in the block's causal order.
    """

    def init_cache(self, z: Float[Tensor, "b t c"], context: Tensor | None = None) -> Any:
        """A fresh cache, of any type, for solving the rows of `z` under `context` (one row each, or `None`)."""
        ...

    def update(
        self, x: Float[Tensor, "b t c"], z: Float[Tensor, "b t c"], start: int, stop: int, cache: Any
    ) -> Float[Tensor, "b n c"]:
        """g(x)[:, start:stop], given that the cache holds positions before start-1.

        Positions start-1 .. stop-2 are read from `x` and written to the cache in place; `x` and `z` are not changed.
        """
        ...


class FrontPerSample(ABC):
    """A block for which the samples of a batch may each stand at a token of their own, and leave and enter."""

    @abstractmethod
    def update_at(
        self, x: Float[Tensor, "b t c"], z: Float[Tensor, "b t c"], start: Int[Tensor, " b"], size: int, end: int,
        cache: Any,
    ) -> Float[Tensor, "b n c"]:  # fmt: skip
        """`update` of entries start_b .. start_b + size - 1 in sample b.

        `end` is the largest of the stops start_b + size, as a number on the host.
        """

    @abstractmethod
    def move(self, cache: Any, source: Int[Tensor, " m"], target: Int[Tensor, " m"], num: int) -> Any:
        """The cache of `num` samples: rows `source` go to rows `target`, and the first `num` stay. In place."""

    @abstractmethod
    def refill(self, cache: Any, rows: Int[Tensor, " m"], context: Tensor | None = None) -> None:
        """Make `rows` those of new samples under `context`, with nothing kept yet. In place."""


class Replayable:
    """A `FrontPerSample` whose `update_at` runs the same kernels whatever the values are.

    A GPU can then capture them in a graph, and launch them all at once; see `jacobiflow.solvers.replay`.
    """


class LowPrecision(ABC):
    """A block whose network can also run in bfloat16, on the same float32 state."""

    @abstractmethod
    def lower(self, cache: Any) -> Any:
        """A copy of the cache with which `update` runs the network in bfloat16."""


@dataclass(frozen=True)
class Extrapolation:
    """Parameters that move away from those of an unconditional row: entry t gets p + w_t (p - p_unconditional).

    **Attributes:** the weights w (T,) of `log_scale` and of `shift`; `attn_temperature` divides the attention logits of
    the unconditional row.
    """

    log_scale: Float[Tensor, " t"]
    shift: Float[Tensor, " t"]
    attn_temperature: float


class ExactInverse(ABC):
    """A block that can run its own recurrence, all T tokens in one call, where PyTorch would take several a token."""

    @abstractmethod
    def exact_inverse(
        self, z: Float[Tensor, "b t c"], context: Tensor | None = None, extrapolation: Extrapolation | None = None
    ) -> Float[Tensor, "b t c"] | None:
        """The x with x_t = g(x)_t, token by token; `None` where this device, dtype or installation has no such call.

        With `extrapolation` g is that of the guided block.
        """


class KeepsNothing:
    """A block that keeps no tensor between calls, so that solvers may run it in inference mode, a tenth faster.

    A tensor that a block keeps from inference mode (a mask made on first use, say) could not be trained with later.
    """


class AffineBlock(ABC):
    """A block whose map is affine in z: g(x) = exp(log_scale(x)) z + shift(x), eq. (3) of the GS-Jacobi paper."""

    @abstractmethod
    def init_cache(
        self,
        z: Float[Tensor, "b t c"],
        context: Tensor | None = None,
        attn_temperature: Float[Tensor, " b"] | None = None,
    ) -> Any:
        """A fresh cache; `attn_temperature` divides the attention logits of each row, where the block has any."""

    @abstractmethod
    def affine(
        self, x: Float[Tensor, "b t c"], start: int, stop: int, cache: Any
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n c"]]:
        """Log-scale and shift of entries start .. stop-1; reads and caches positions start-1 .. stop-2."""

    def affine_whole(
        self,
        x: Float[Tensor, "b t c"],
        context: Tensor | None = None,
        attn_temperature: Float[Tensor, " b"] | None = None,
    ) -> tuple[Float[Tensor, "b t c"], Float[Tensor, "b t c"]]:
        """Log-scale and shift of all entries, from one parallel pass; `attn_temperature` is that of `init_cache`.

        A block that needs no cache for it overrides this.
        """
        own = () if attn_temperature is None else (attn_temperature,)  # a block without attention need not take it
        return self.affine(x, 0, x.shape[1], self.init_cache(x, context, *own))

    def update(
        self, x: Float[Tensor, "b t c"], z: Float[Tensor, "b t c"], start: int, stop: int, cache: Any
    ) -> Float[Tensor, "b n c"]:
        """g(x)[:, start:stop] = exp(log_scale) z + shift."""
        log_scale, shift = self.affine(x, start, stop, cache)
        return torch.addcmul(shift, log_scale.exp(), z[:, start:stop])

    def output_weights(self) -> tuple[Float[Tensor, "o d"] | None, Float[Tensor, "o d"]] | None:
        """W_s and W_u of the linear layer that ends in `log_scale` = W_s h + b_s and `shift` = W_u h + b_u.

        Their rows are channels where the layer acts on each token, and entries where it acts on all at once. W_s is
        `None` where the scale is fixed (volume-preserving). By default `None`: the block has no such layer.
        """
        return None


class AffineFrontPerSample(AffineBlock, FrontPerSample):
    """An affine block with a front per sample."""

    @abstractmethod
    def refill(
        self,
        cache: Any,
        rows: Int[Tensor, " m"],
        context: Tensor | None = None,
        attn_temperature: Float[Tensor, " m"] | None = None,
    ) -> None:
        """See `FrontPerSample.refill`; `attn_temperature` is that of `init_cache`."""

    @abstractmethod
    def affine_at(
        self, x: Float[Tensor, "b t c"], start: Int[Tensor, " b"], size: int, end: int, cache: Any
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n c"]]:
        """`affine` of `size` entries from start_b on in sample b; see `FrontPerSample.update_at`."""

    def update_at(
        self, x: Float[Tensor, "b t c"], z: Float[Tensor, "b t c"], start: Int[Tensor, " b"], size: int, end: int,
        cache: Any,
    ) -> Float[Tensor, "b n c"]:  # fmt: skip
        """`update` with a start per sample; see `FrontPerSample.update_at`."""
        log_scale, shift = self.affine_at(x, start, size, end, cache)
        return torch.addcmul(shift, log_scale.exp(), run_of(z, start, size))


def evaluate(
    block: Block, x: Float[Tensor, "b t c"], z: Float[Tensor, "b t c"], context: Tensor | None = None
) -> Float[Tensor, "b t c"]:
    """g(x), all entries at once, without a cache where the block needs none for that."""
    if isinstance(block, AffineBlock):
        log_scale, shift = block.affine_whole(x, context)
        return torch.addcmul(shift, log_scale.exp(), z)
    return block.update(x, z, 0, z.shape[1], block.init_cache(z, context))


def run_of(x: Float[Tensor, "b t c"], start: int | Int[Tensor, " b"], size: int) -> Float[Tensor, "b n c"]:
    """x[b, start_b : start_b + size] for every sample b; a view where `start` is common to all."""
    if isinstance(start, int):
        return x[:, start : start + size]
    return x.gather(1, _places(start, size, x.shape[2]))


def put_run(x: Float[Tensor, "b t c"], run: Float[Tensor, "b n c"], start: int | Int[Tensor, " b"]) -> None:
    """Write what `run_of` reads, in place."""
    if isinstance(start, int):
        x[:, start : start + run.shape[1]] = run
    else:
        x.scatter_(1, _places(start, run.shape[1], x.shape[2]), run)


def _places(start: Int[Tensor, " b"], size: int, channels: int) -> Int[Tensor, "b n c"]:
    places = start.view(-1, 1) + torch.arange(size, device=start.device)
    return places.unsqueeze(-1).expand(-1, -1, channels)


class FlowBlock(AffineBlock, nn.Module):
    """An affine block of an image flow, called as `block(x, labels)` for the log-scale and shift of all its entries.

    Tokens are in the block's own causal order, which `permutation` makes of the raster order and back.
    """

    permutation: Permutation

    def forward(
        self, x: Float[Tensor, "b t c"], labels: Int[Tensor, " b"] | None = None
    ) -> tuple[Float[Tensor, "b t c"], Float[Tensor, "b t c"]]:
        """`affine_whole`."""
        return self.affine_whole(x, labels)

    def row_bytes(self) -> int | None:
        """Bytes that a row takes while it is solved: what is kept of its tokens, and what a sweep of all makes.

        `None` where the block does not say.
        """
        return None


def check_input(z: Float[Tensor, "b t c"], context: Tensor | None, num_tokens: int, token_channels: int) -> None:
    """What `init_cache` checks: **raises** `TypeError` or `ValueError` where `z` is not (B, T, C), or the labels in
    `context` have not a row for each of its rows.
    """
    if z.ndim != 3 or z.shape[1:] != (num_tokens, token_channels):
        raise InputValueError(f"z={short(z)}: this block takes (B, {num_tokens}, {token_channels})")
    if context is not None:
        check_rows("context", context, len(z), "samples")
