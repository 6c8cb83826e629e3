"""A fixed-point problem x = g(x): the inverse of a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.blocks.base import AffineBlock, Block, TokensLogDet, apply_affine, no_gradients
from jacobiflow.blocks.context import NO_CONTEXT, Context
from jacobiflow.blocks.tokens import Tokens, row_batches
from jacobiflow.errors import InputTypeError, InputValueError
from jacobiflow.utils.checks import check_finite, check_kind, check_rows, format_value

_GIVE_TOKENS = "float32 or float64 tokens (B, T, C), whatever the network runs in"


@dataclass(frozen=True, eq=False)
class Problem:
    """The problem x = g(x), whose solution is the inverse of a block at `z`.

    Attributes:
        block: Gives g.
        z: Input of the block in its causal order.
        context: Context of the rows of `z`.

    Example:
        >>> problem = jf.Problem.checked(jf.load("digits-p1").blocks[0], torch.ones(2, 64, 1), context=None)
        >>> residual, log_det = problem.residual(torch.zeros(2, 64, 1))
        >>> residual.shape
        torch.Size([2])
    """

    block: Block
    z: Tokens
    context: Context = NO_CONTEXT

    @classmethod
    def checked(cls, block: Any, z: Any, context: Any) -> Problem:
        """Returns the problem of arguments that a user gave.

        Raises:
            TypeError: If `block` is not a block, or `z` is not float32 or float64.
            ValueError: If `z` is not (B, T, C) and finite, or the context does not fit it.
        """
        check_kind("block", block, Block, "a block, such as flow.blocks[0]")
        _check_tokens("z", z)
        check_finite("z", z)
        context = Context.of(context)
        for name, tensor in (("context", context.values), ("temperature", context.temperature)):
            if tensor is not None:
                check_rows(name, tensor, len(z), "rows of z")
                _check_device(name, tensor, z.device)
        return cls(block, z, context)

    def __len__(self) -> int:
        return len(self.z)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.z.shape[1]

    def __getitem__(self, rows: Any) -> Problem:
        """Returns the problem of some samples: a slice, a mask or indices."""
        return Problem(self.block, self.z[rows], self.context[rows])

    def batches(self, size: int | None) -> list[slice]:
        """Returns the rows of batches of at most `size` samples; all at once for `None`."""
        return row_batches(len(self), size)

    def evaluate(self, x: Tokens) -> TokensLogDet:
        """Returns g(x), all entries at once, and the sums of log_scale(x); these are NaN if the block is not affine."""
        if isinstance(self.block, AffineBlock):
            parameters = self.block.affine_whole(x, self.context)
            return apply_affine(parameters, self.z), parameters[0].sum(dim=(1, 2))
        g = self.block.update(x, self.z, 0, self.num_tokens, self.block.init_cache(self.z, self.context))
        return g, self.z.new_full((len(self),), torch.nan)

    def residual(self, x: Tokens, batch_size: int | None = None) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Returns the largest |g(x) - x| of an entry of each sample, and the sums of log_scale(x).

        It is the certificate: one parallel pass. The residual of a sample that is not finite is infinite.

        Raises:
            ValueError: If `x` are not tokens like z.
        """
        self.check_same_shape("x", x)
        residual, log_det = self.z.new_empty(len(self)), self.z.new_empty(len(self))
        with no_gradients(self.block):
            for rows in self.batches(batch_size):
                g, log_det[rows] = self[rows].evaluate(x[rows])
                residual[rows] = (g - x[rows]).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).amax(dim=(1, 2))
        return residual, log_det

    def check_same_shape(self, name: str, x: Any) -> None:
        """Checks that `x` are tokens like `z`."""
        _check_tokens(name, x)
        if x.shape != self.z.shape:
            raise InputValueError(f"{name}={format_value(x)}: give {_GIVE_TOKENS}, as many as z")
        _check_device(name, x, self.z.device)


def _check_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise InputValueError(f"{name}: on {value.device}, but {device} is needed; move one of them")


def _check_tokens(name: str, tokens: Any) -> None:
    check_kind(name, tokens, Tensor, _GIVE_TOKENS)
    if tokens.dtype not in (torch.float32, torch.float64):
        raise InputTypeError(f"{name}={format_value(tokens)}: give {_GIVE_TOKENS}")
    if tokens.ndim != 3 or not tokens.shape[1:].numel():
        raise InputValueError(f"{name}={format_value(tokens)}: give {_GIVE_TOKENS}")
