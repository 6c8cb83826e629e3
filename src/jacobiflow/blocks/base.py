"""The protocol of a block: the fixed-point map g on any run of tokens, with a cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jacobiflow.blocks.context import NO_CONTEXT, Context, GuidedRows
from jacobiflow.blocks.permutation import Permutation
from jacobiflow.blocks.tokens import Tokens, gather_run
from jacobiflow.errors import InputValueError, UnsupportedError
from jacobiflow.utils.checks import format_value

ScaleShift = tuple[Float[Tensor, "b n c"], Float[Tensor, "b n c"]]
"""Log-scale and shift of a run of entries."""

TokensLogDet = tuple[Float[Tensor, "b t c"], Float[Tensor, " b"]]
"""Tokens, and log|det| of each sample in nats."""


@runtime_checkable
class Block(Protocol):
    """An autoregressive map g whose fixed point x = g(x) is the inverse of a block at `z`.

    Entry t of g(x) depends on x[:, :t] only; the block itself owns that shift by one. Tokens `x` and `z` are
    (B, T, C) in the block's causal order. A block may also set `is_pure` and define `sequential_inverse`, as an
    `AffineBlock` does.

    Example:
        >>> isinstance(jf.load("digits-p1").blocks[0], jf.Block)
        True
    """

    def init_cache(self, z: Tokens, context: Context = NO_CONTEXT) -> Any:
        """Returns a new cache, of any type, for solving the rows of `z`; `context.values` has a row for each."""
        ...

    def update(self, x: Tokens, z: Tokens, start: int, stop: int, cache: Any) -> Float[Tensor, "b n c"]:
        """Returns g(x)[:, start:stop], given that the cache holds positions before start-1.

        Positions start-1 .. stop-2 are read from `x` and written to the cache in place; `x` and `z` are not changed.
        """
        ...


class AffineBlock(ABC):
    """A block whose map is affine in z: g(x) = exp(log_scale(x)) z + shift(x), eq. (3) of the GS-Jacobi paper.

    It needs `init_cache` and `affine`. The attributes and the other methods are optional.

    Attributes:
        is_pure: A promise that entry t depends on x[:, :t] only, and on nothing random, and that the block keeps no
            tensor between calls. Solvers then run it in inference mode, and take its exact answers without measuring
            them.
        supports_guidance: Guidance applies to the block.

    Example:
        >>> log_scale, shift = jf.load("digits-p1").blocks[0].affine_whole(torch.zeros(2, 64, 1))
        >>> log_scale.shape
        torch.Size([2, 64, 1])
    """

    is_pure: bool = False
    supports_guidance: bool = True

    @abstractmethod
    def init_cache(self, z: Tokens, context: Context = NO_CONTEXT) -> Any:
        """Returns a new cache; see `Block`."""

    @abstractmethod
    def affine(self, x: Tokens, start: int, stop: int, cache: Any) -> ScaleShift:
        """Returns log-scale and shift of entries start .. stop-1; reads and caches positions start-1 .. stop-2."""

    def affine_whole(self, x: Tokens, context: Context = NO_CONTEXT) -> ScaleShift:
        """Returns log-scale and shift of all entries; a block that needs no cache for it overrides this."""
        return self.affine(x, 0, x.shape[1], self.init_cache(x, context))

    def update(self, x: Tokens, z: Tokens, start: int, stop: int, cache: Any) -> Float[Tensor, "b n c"]:
        """Returns g(x)[:, start:stop]; see `Block`."""
        return apply_affine(self.affine(x, start, stop, cache), z[:, start:stop])

    def unconditional(self, values: Tensor) -> Tensor:
        """Returns the values of a context for unconditional rows beside these; by default the label -1."""
        return torch.full_like(values, -1)

    def sequential_inverse(
        self, z: Tokens, context: Context = NO_CONTEXT, batch_size: int | None = None
    ) -> TokensLogDet:
        """Solves x_t = g(x)_t token by token in one call; returns x and log|det dx/dz|, the sums of log_scale(x).

        `batch_size` samples are solved at a time, all by default. If `z` requires gradients, the results have them in
        z, a context and the parameters.

        Raises:
            UnsupportedError: If the block has no such call for this device, dtype or installation, or with gradients.
                Solvers then solve token by token in PyTorch, and keep the message as `Solution.obstacle`.
        """
        raise UnsupportedError(f"{type(self).__name__} has no sequential_inverse")

    def guided_inverse(self, z: Tokens, rows: GuidedRows, batch_size: int | None = None) -> TokensLogDet:
        """Returns the result of `sequential_inverse` under guidance: the network has two rows for each sample.

        Raises:
            UnsupportedError: As `sequential_inverse` does, or if the block has no such call for these rows.
        """
        raise UnsupportedError(f"{type(self).__name__} has no guided_inverse")

    def output_weights(self) -> tuple[Float[Tensor, "o d"] | None, Float[Tensor, "o d"]] | None:
        """Returns W_s and W_u of the last layer, if `log_scale` = W_s h + b_s and `shift` = W_u h + b_u; else `None`.

        If the layer acts on each token, they have a row for each value of a token; if it acts on all tokens at once,
        for each entry. W_s is `None` if the scale is fixed (volume-preserving).
        """
        return None


class AttentionBlock(ABC):
    """A mixin for an affine block with causal attention, whose cache has keys and values for each sample.

    Solvers let each sample stand at a token of its own, leave and enter. They may run the network in bfloat16. On a GPU
    they capture `affine_at` in CUDA graphs, so it launches the same kernels whatever the values are. The block divides
    its attention logits by the temperatures of a `Context`.

    Example:
        >>> isinstance(jf.load("digits-p1").blocks[0], jf.AttentionBlock)
        True
    """

    @abstractmethod
    def affine_at(self, x: Tokens, start: Int[Tensor, " b"], size: int, end: int, cache: Any) -> ScaleShift:
        """Returns `affine` of entries start_b .. start_b + size - 1 in sample b; `end` is the largest of the stops."""

    @abstractmethod
    def move_rows(self, cache: Any, source: Int[Tensor, " m"], target: Int[Tensor, " m"], num: int) -> Any:
        """Returns the cache of `num` samples: rows `source` go to rows `target`, in place, and the first `num` stay."""

    @abstractmethod
    def reset_rows(self, cache: Any, rows: Int[Tensor, " m"], context: Context = NO_CONTEXT) -> None:
        """Makes `rows` those of new samples under `context`, with an empty cache, in place."""

    @abstractmethod
    def to_bf16(self, cache: Any) -> Any:
        """Returns a copy of the cache with which the network runs in bfloat16, on tokens of the same dtype."""

    def update_at(
        self, x: Tokens, z: Tokens, start: Int[Tensor, " b"], size: int, end: int, cache: Any
    ) -> Float[Tensor, "b n c"]:
        """Returns `update` with a start per sample; see `affine_at`."""
        return apply_affine(self.affine_at(x, start, size, end, cache), gather_run(z, start, size))


class FlowBlock(AffineBlock, nn.Module):
    """An affine block of a flow, called as `block(x, context)` for the log-scale and shift of all its entries.

    Tokens are in the block's own causal order; `permutation` takes the order of the data to it and back.
    """

    permutation: Permutation

    def forward(self, x: Tokens, context: Tensor | Context | None = None) -> ScaleShift:
        """Returns `affine_whole`."""
        return self.affine_whole(x, Context.of(context))

    def encode(self, x: Tokens, context: Context = NO_CONTEXT) -> TokensLogDet:
        """Returns z = exp(-log_scale(x)) (x - shift(x)), and log|det dz/dx|, minus the sums of log_scale(x)."""
        log_scale, shift = _checked(self(x, context), x)
        return (x - shift) * torch.exp(-log_scale), -log_scale.sum(dim=(1, 2))

    def row_bytes(self) -> int | None:
        """Returns the bytes of a row while it is solved, its cache and a sweep of all tokens; `None` if not known."""
        return None

    def cache_bytes(self) -> int:
        """Returns the bytes of the keys and values of a row; 0 for a block without attention."""
        return 0

    def copy_bytes(self) -> int:
        """Returns the bytes of the copy of its weights that `sequential_inverse` makes, at most."""
        return 0


def apply_affine(parameters: ScaleShift, z: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
    """Returns exp(log_scale) z + shift."""
    log_scale, shift = _checked(parameters, z)
    return torch.addcmul(shift, log_scale.exp(), z)


def _checked(parameters: ScaleShift, tokens: Float[Tensor, "b n c"]) -> ScaleShift:
    """Returns the log-scale and the shift of a block, if there is one of each for each entry of the tokens.

    A log-scale that all values of a token share would broadcast, but count once in the density.
    """
    if any(each.shape != tokens.shape for each in parameters):
        log_scale, shift = map(format_value, parameters)
        raise InputValueError(
            f"log_scale={log_scale}, shift={shift}: a block returns one of each for each entry, here "
            f"{tuple(tokens.shape)}; expand them"
        )
    return parameters


def is_pure(block: Any) -> bool:
    """Tells if a block, affine or not, is pure; see `AffineBlock`."""
    return getattr(block, "is_pure", False)


def no_gradients(block: Any) -> AbstractContextManager[None]:
    """Returns inference mode for a block that is pure, else `torch.no_grad`.

    A tensor from inference mode that a block kept could not be trained with.
    """
    return torch.inference_mode() if is_pure(block) else torch.no_grad()


def check_context_rows(context: Context, num: int) -> None:
    """Raises UnsupportedError if a context does not have `num` rows, since slices of it would fit by chance."""
    if any(tensor is not None and len(tensor) != num for tensor in (context.values, context.temperature)):
        raise UnsupportedError("a context for another number of samples")


def check_input(z: Tokens, num_tokens: int, token_dim: int) -> None:
    """Checks that `z` is (B, T, C)."""
    if z.ndim != 3 or z.shape[1:] != (num_tokens, token_dim):
        raise InputValueError(f"z={format_value(z)}: this block takes (B, {num_tokens}, {token_dim})")
