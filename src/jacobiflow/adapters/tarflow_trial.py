"""The trial of a live TarFlow block: compares its own `reverse` with native code."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jacobiflow.adapters.passes import is_stateful
from jacobiflow.errors import UnsupportedError, first_line

MAX_GUIDANCE = 10.0  # The largest guidance that is tried.
TEMPERATURES = (0.1, 10.0)  # The lowest and the highest attention temperature that are tried.
_GUIDED: tuple[dict[str, Any], ...] = (
    {"guidance": 0.3, "guide_what": "a", "attn_temp": TEMPERATURES[0], "annealed_guidance": False},
    {"guidance": MAX_GUIDANCE, "guide_what": "b", "attn_temp": TEMPERATURES[1], "annealed_guidance": False},
    {"guidance": MAX_GUIDANCE, "guide_what": "ab", "attn_temp": 1.0, "annealed_guidance": True},
    {"guidance": 3, "guide_what": "ab", "attn_temp": 0.7, "annealed_guidance": True},
)
_FEW_TOKENS = 12  # Number of tokens in most comparisons.
_LARGE_BLOCK = 2e9  # Weights times tokens, about a second. Larger blocks are compared on all tokens less often.
_MAX_LOG_SCALE = 8.0  # The largest log-scale of random weights.
_OUTPUT_GAIN = 0.05  # Factor of the last layer's random weights, so that rounding does not grow from token to token.
_MAX_ERROR = 1e-4  # The largest relative difference, beside rounding that has grown.
_PERTURBATION = 1e-6  # Relative change of x that shows how rounding grows.


@dataclass(frozen=True)
class TrialResult:
    """The calls for which a block computes the same as native code.

    Attributes:
        has_log_det: Its `reverse` also returns the log-determinant.
        takes_fewer_tokens: They may have fewer tokens than the block has positions.
        in_training: The block may be in training mode.
    """

    has_log_det: bool
    takes_fewer_tokens: bool
    in_training: bool


@contextmanager
def _default_settings() -> Iterator[None]:
    """Sets PyTorch's defaults, whatever the caller has set, and leaves the caller's random numbers alone."""
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


def run_trial(
    block: Any,
    native: Callable[..., tuple[Tensor, Tensor]],
    parameters: Collection[str],
    trials: dict[bytes | None, TrialResult],
) -> TrialResult:
    """Compares a block's `reverse` with native code, on a copy of the block on a CPU in float32.

    Args:
        native: Computes `reverse` of a block by native code, with its arguments.
        parameters: The names of the parameters of the block's `reverse`.
        trials: The results of earlier blocks, to which this one is added. Blocks that differ only in the values of
            their weights share the comparisons with random weights.

    Raises:
        UnsupportedError: If results differ, or the block's code raises an error.
    """
    with _default_settings():
        try:
            trial, key = _Trial(block, native, parameters), _bytes_without_weights(block)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UnsupportedError(f"it cannot be tried: {type(error).__name__}: {first_line(error)}") from error
        trial.compare_own_weights()
        result = trials.get(key) or trial.compare_random_weights()
        if key is not None:
            trials[key] = result
        return result


def _bytes_without_weights(block: nn.Module) -> bytes | None:
    """Returns a file of the block in which only the values of its weights are missing; `None` if it cannot be saved."""
    weights: dict[int, Any] = {id(weight): torch.empty_like(weight, device="meta") for weight in block.parameters()}
    file = io.BytesIO()
    try:
        torch.save(copy.deepcopy(block, weights), file)
    except (AttributeError, TypeError, pickle.PicklingError):  # A class of a function, or an object without a pickle.
        return None
    return file.getvalue()


class _Trial:
    """A copy of a block whose `reverse` is compared with native code."""

    def __init__(self, block: Any, native: Callable[..., tuple[Tensor, Tensor]], parameters: Collection[str]) -> None:
        self._block = copy.deepcopy(block).cpu().float().eval()
        self._native, self._parameters, self._generator = native, parameters, torch.Generator().manual_seed(0)
        self._tokens, self._channels = len(self._block.pos_embed), self._block.proj_in.in_features
        self._input_scale, self._is_random, self._num_results = torch.ones(self._channels, device="cpu"), False, 0
        work = self._tokens * sum(weight.numel() for weight in self._block.parameters())
        self._is_large, self._is_conditional = work > _LARGE_BLOCK, getattr(self._block, "cond_proj", None) is not None

    def compare_own_weights(self) -> None:
        """Compares a call with the block's own weights."""
        if not (self._is_large and self._agrees(2, _FEW_TOKENS)):
            self._compare(2, self._tokens)

    def compare_random_weights(self) -> TrialResult:
        """Compares all forms of arguments that native code will take."""
        self._draw_weights(-1)
        few = min(_FEW_TOKENS, self._tokens - 1)
        takes_fewer = few > 0 and self._agrees(2, few)
        few = few if takes_fewer else self._tokens
        guided = _GUIDED if "guidance" in self._parameters and not self._is_conditional else ({},)
        self._compare(1, few)
        self._compare(2, few, 0)
        self._compare(40, few, None)
        self._compare(2, few, attn_temp=TEMPERATURES[1], annealed_guidance=True, guide_what="a")
        for rows, arguments in enumerate(guided, start=2):
            self._compare(rows, few, **arguments)
        self._compare(2, few, 0, **guided[0])
        self._compare(2, few, None, **guided[0])
        self._draw_weights(1)
        self._compare(3, self._tokens, **({} if self._is_large else guided[-1]))
        self._block.train()
        in_training = not any(map(is_stateful, self._block.modules())) and self._agrees(2, few)
        return TrialResult(self._num_results == 2, takes_fewer, in_training)

    def _draw_weights(self, sign: int) -> None:
        """Draws random weights. The log-scales are large, with this sign first, and nearly the same for all tokens."""
        block, self._is_random = self._block, True
        for name, weight in block.named_parameters():
            noise = torch.randn(weight.shape, generator=self._generator, device="cpu")
            if "norm" in name and name.endswith("weight"):
                noise = 1 + 0.3 * noise
            elif name.endswith("bias"):
                noise *= 0.3
            elif name.endswith("weight"):
                noise *= (2 if "qkv" in name else 1) / weight.shape[-1] ** 0.5
            weight.copy_(noise)
        block.proj_out.weight *= _OUTPUT_GAIN
        if len(block.proj_out.bias) == 2 * self._channels:
            signs = sign * (-1) ** torch.arange(self._channels, device="cpu")
            log_scale = signs * torch.linspace(_MAX_LOG_SCALE, 1, self._channels, device="cpu")
            block.proj_out.bias[: self._channels] = log_scale
            self._input_scale = (-log_scale).exp()  # It makes x of size 1.

    def _agrees(self, rows: int, tokens: int) -> bool:
        """Returns True if the results of a call do not differ."""
        try:
            self._compare(rows, tokens)
        except UnsupportedError:
            return False
        return True

    def _compare(self, rows: int, tokens: int, label_step: int | None = 1, **arguments: Any) -> None:
        """Compares one call; raises UnsupportedError if the results differ.

        Args:
            label_step: The difference of the labels of adjacent rows; `None` for no labels.
            arguments: Arguments of `reverse`. Those that the block does not have are left out.
        """
        block, z = self._block, torch.randn(rows, tokens, self._channels, generator=self._generator, device="cpu")
        z[:, 1:] *= self._input_scale  # A block does not scale its first token.
        arguments = {name: value for name, value in arguments.items() if name in self._parameters}
        if self._is_conditional:
            size = rows, tokens, block.cond_proj.in_features
            arguments["cond"] = torch.randn(size, generator=self._generator, device="cpu")
        elif getattr(block, "class_embed", None) is not None and label_step is not None:
            arguments["y"] = -label_step * torch.arange(rows, device="cpu") % len(block.class_embed)
        perturbation = 1 + _PERTURBATION * torch.randn(z.shape, generator=self._generator, device="cpu")
        try:
            x = block.permutation(z, inverse=True)
            results = block.reverse(x.clone(), **arguments)
            ours = self._native(block, x=x, **arguments)
            perturbed = self._native(block, x=x * perturbation, **arguments)
        except (UnsupportedError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # The block's code may be anything.
            raise UnsupportedError(
                f"its reverse raises {type(error).__name__} in a trial: {first_line(error)}"
            ) from error
        if self._is_random and not ours[0].isfinite().all():
            raise UnsupportedError("values overflowed in a trial")
        theirs = results if type(results) is tuple else (results,)
        self._num_results = self._num_results or len(theirs)
        growth = 10 if self._is_random else 1000  # A block may be chaotic with its own weights.
        if not (
            len(theirs) == self._num_results <= 2
            and all(_is_close(*tensors, growth) for tensors in zip(theirs, ours, perturbed, strict=False))
        ):
            raise UnsupportedError("its reverse computes something else than that of a TarFlow block")


def _is_close(theirs: Any, ours: Tensor, perturbed: Tensor, growth: float) -> bool:
    """Returns True if finite values differ by rounding; `perturbed` is `ours` for a slightly changed input."""
    if type(theirs) is not Tensor or theirs.dtype != ours.dtype or theirs.shape != ours.shape:
        return False
    rounding = (perturbed - ours).abs().amax(dim=-1, keepdim=True)
    is_close = (theirs - ours).abs() <= _MAX_ERROR * (1 + theirs.abs()) + growth * rounding
    return bool((is_close | ~(ours + rounding).isfinite()).all())
