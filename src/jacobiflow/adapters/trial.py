"""The trial of a live TarFlow block: its own `reverse` against native code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jacobiflow.adapters.passes import is_stateful

MAX_GUIDANCE = 10.0  # the largest that is tried
TEMPERATURES = (0.1, 10.0)  # of attention: the lowest and the highest that are tried
_LOW, _HIGH = TEMPERATURES
_GUIDED: tuple[dict[str, Any], ...] = (
    {"guidance": 0.3, "guide_what": "a", "attn_temp": _LOW, "annealed_guidance": False},
    {"guidance": MAX_GUIDANCE, "guide_what": "b", "attn_temp": _HIGH, "annealed_guidance": False},
    {"guidance": MAX_GUIDANCE, "guide_what": "ab", "attn_temp": 1.0, "annealed_guidance": True},
    {"guidance": 3, "guide_what": "ab", "attn_temp": 0.7, "annealed_guidance": True},
)
_FEW = 12  # tokens of most comparisons
_WORK = 2e9  # weights times tokens, about a second: above, fewer comparisons are of all tokens
_LOG_SCALE = 8.0  # the largest of random weights
_GAIN = 0.05  # of the last layer's random weights: so small that rounding does not grow from token to token
_CLOSE = 1e-4  # the largest relative difference, beside rounding that has grown
_NUDGE = 1e-6  # a relative change of x, by which the growth of rounding is measured


@dataclass(frozen=True)
class TrialResult:
    """What a trial showed of a block that computes the same as native code.

    Attributes:
        has_log_det: Its `reverse` also returns the log-determinant.
        takes_fewer_tokens: It computes the same for fewer tokens than it has positions.
        in_training: It computes the same in training mode.
    """

    has_log_det: bool
    takes_fewer_tokens: bool
    in_training: bool


@contextmanager
def _plain_pytorch() -> Iterator[None]:
    """PyTorch's defaults, whatever the caller has set, and random numbers that are not the caller's."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"),
            torch.random.fork_rng(devices=[]),
        ):  # fmt: skip
            yield
    finally:
        torch.set_default_dtype(dtype)


class Trial:
    """Compares a copy of a block, on a CPU in float32, with `native`, which takes the block and its arguments.

    Attributes:
        obstacle: Why the latest comparison failed; empty if both gave the same.
    """

    @_plain_pytorch()
    def __init__(
        self, block: Any, native: Callable[..., tuple[Tensor, Tensor] | None], parameters: Collection[str]
    ) -> None:
        self._block = copy.deepcopy(block).cpu().float().eval()
        for part in self._block.modules():  # they are the user's; a block with hooks is left to its own code
            part._forward_hooks.clear()
            part._forward_pre_hooks.clear()
        self._native, self._parameters, self._generator = native, parameters, torch.Generator().manual_seed(0)
        self._tokens, self._values = len(self._block.pos_embed), self._block.proj_in.in_features
        self._scale, self._is_random, self._results = torch.ones(self._values), False, 0
        work = self._tokens * sum(weight.numel() for weight in self._block.parameters())
        self._is_large, self._is_conditional = work > _WORK, getattr(self._block, "cond_proj", None) is not None
        self.obstacle = ""

    @_plain_pytorch()
    def agrees_on_own_weights(self) -> bool:
        """Returns True if both give the same for the block's own weights."""
        return (self._is_large and self._agrees(2, _FEW)) or self._agrees(2, self._tokens)

    @_plain_pytorch()
    def try_random_weights(self) -> TrialResult | None:
        """Compares all forms of arguments that native code will take; `None` if the block differs."""
        self._draw_weights(-1)
        few = min(_FEW, self._tokens - 1)
        takes_fewer = few > 0 and self._agrees(2, few)
        few = few if takes_fewer else self._tokens
        guided = _GUIDED if "guidance" in self._parameters and not self._is_conditional else ({},)
        agrees = (
            self._agrees(1, few) and self._agrees(2, few, 0) and self._agrees(40, few, None)
            and self._agrees(2, few, attn_temp=_HIGH, annealed_guidance=True, guide_what="a")
            and all(self._agrees(rows, few, **arguments) for rows, arguments in enumerate(guided, start=2))
            and self._agrees(2, few, 0, **guided[0]) and self._agrees(2, few, None, **guided[0])
        )  # fmt: skip
        self._draw_weights(1)
        if not agrees or not self._agrees(3, self._tokens, **({} if self._is_large else guided[-1])):
            return None
        self._block.train()
        in_training = not any(map(is_stateful, self._block.modules())) and self._agrees(2, few)
        return TrialResult(self._results == 2, takes_fewer, in_training)

    def _draw_weights(self, sign: int) -> None:
        """Draws weights whose log-scales are large, and nearly the same for all tokens."""
        block, self._is_random = self._block, True
        for name, weight in block.named_parameters():
            noise = torch.randn(weight.shape, generator=self._generator)
            if "norm" in name and name.endswith("weight"):
                noise = 1 + 0.3 * noise
            elif name.endswith("bias"):
                noise *= 0.3
            elif name.endswith("weight"):
                noise *= (2 if "qkv" in name else 1) / weight.shape[-1] ** 0.5
            weight.copy_(noise)
        block.proj_out.weight *= _GAIN
        if len(block.proj_out.bias) == 2 * self._values:
            log_scale = sign * (-1) ** torch.arange(self._values) * torch.linspace(_LOG_SCALE, 1, self._values)
            block.proj_out.bias[: self._values] = log_scale
            self._scale = (-log_scale).exp()  # so that x is of size 1

    def _agrees(self, rows: int, tokens: int, step: int | None = 1, **arguments: Any) -> bool:
        """Compares a call, with labels of classes in turn, all of the first (`step` 0) or none (`None`)."""
        block, z = self._block, torch.randn(rows, tokens, self._values, generator=self._generator)
        z[:, 1:] *= self._scale  # the first token stays as it is
        arguments = {name: value for name, value in arguments.items() if name in self._parameters}
        if self._is_conditional:
            size = rows, tokens, block.cond_proj.in_features
            arguments["cond"] = torch.randn(size, generator=self._generator)
        elif getattr(block, "class_embed", None) is not None and step is not None:
            arguments["y"] = -step * torch.arange(rows) % len(block.class_embed)
        nudge = 1 + _NUDGE * torch.randn(z.shape, generator=self._generator)
        try:
            x = block.permutation(z, inverse=True)
            results = block.reverse(x.clone(), **arguments)
            ours, near = self._native(block, x, **arguments), self._native(block, x * nudge, **arguments)
        except Exception as error:  # of the block's own code
            self.obstacle = f"its reverse raises {type(error).__name__} in a trial: {error}"
            return False
        theirs = results if type(results) is tuple else (results,)
        self._results = self._results or len(theirs)
        self.obstacle = "its reverse computes something else than that of a TarFlow block"
        if ours is None or near is None or (self._is_random and not ours[0].isfinite().all()):
            self.obstacle = "native code did not run in a trial, or its values overflowed"
        elif len(theirs) == self._results <= 2:
            growth = 10 if self._is_random else 1000  # a block may be chaotic with its own weights
            are_close = (_is_close(*values, growth) for values in zip(theirs, ours, near, strict=False))
            self.obstacle = self.obstacle if not all(are_close) else ""
        return not self.obstacle


def _is_close(theirs: Any, ours: Tensor, near: Tensor, growth: float) -> bool:
    """True if they differ by rounding where values are finite; `near` is what a change of the input makes of `ours`."""
    if type(theirs) is not Tensor or theirs.dtype != ours.dtype or theirs.shape != ours.shape:
        return False
    rounding = (near - ours).abs().amax(dim=-1, keepdim=True)
    is_close = (theirs - ours).abs() <= _CLOSE * (1 + theirs.abs()) + growth * rounding
    return bool((is_close | ~(ours + rounding).isfinite()).all())
