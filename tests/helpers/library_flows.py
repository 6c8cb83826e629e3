"""Flows of zuko, nflows and normflows whose inverse is hard. The oracle is the library's own inverse of the flow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import nflows.transforms as nf
import torch
import zuko
from nflows.transforms import autoregressive as nfa
from nflows.transforms.made import MADE
from normflows.flows import AutoregressiveRationalQuadraticSpline, MaskedAffineAutoregressive
from torch import Tensor, nn

import jacobiflow as jf
from tests.helpers.random_flows import values

CONTEXT = 3


def outcome(call: Callable[[], Any]) -> Any:
    """The result of `call`, or the class of the error that a spline raises."""
    try:
        return call()
    except AssertionError as error:
        return type(error)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def masked_layers(flow: nn.Module) -> list[nn.Module]:
    return [module for module in flow.modules() if type(module).__name__ == "MaskedLinear"]


@contextmanager
def counted(flow: nn.Module) -> Iterator[dict[str, int]]:
    """Counts the passes of each transform of a flow in evaluation mode: calls of its network's first masked layer."""
    calls: Counter[str] = Counter()
    hooks = [
        masked_layers(module)[0].register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
        for name, module in flow.named_modules()
        if hasattr(module, "autoregressive_net") or isinstance(module, zuko.flows.MaskedAutoregressiveTransform)
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Case:
    """A kind of flow: `build(features, context)`, and how its slow side is called."""

    library: str
    build: Callable[[int, int], nn.Module]
    gain: float
    features: int = 24
    is_inverse: bool = True  # the slow side

    def make(self, context: int = 0, features: int = 0, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """In evaluation mode, with weights so large that entries depend strongly on those before."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            flow = self.build(features or self.features, context)
            for name, weight in flow.named_parameters():
                if name.endswith("weight") and weight.ndim == 2:
                    weight.mul_(self.gain)
        return flow.to(dtype).eval()

    def invert(self, flow: nn.Module, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, ...]:
        """The slow side: (x,) of zuko's, (x, logabsdet) of the others'."""
        if self.library == "zuko":  # which computes no more than that
            lazy = flow(context)
            return (getattr(lazy, "transform", lazy).inv(y),)
        return values(flow, y, context, self.is_inverse)


def problem_of(name: str, dtype: torch.dtype = torch.float32) -> tuple[Case, nn.Module, Tensor, Tensor]:
    """A case, its flow, and five rows to invert with their contexts."""
    case = CASES[name]
    c = normal(5, CONTEXT, seed=1, dtype=dtype)
    return case, case.make(CONTEXT, dtype=dtype), normal(5, case.features, dtype=dtype), c


def both(case: Case, flow: nn.Module, y: Tensor, context: Tensor | None = None, tolerance: float = 0.0) -> Any:
    """The library's answer, the accelerated one, and the passes of both, of which the latter are never more."""
    with counted(flow) as original:
        expected = case.invert(flow, y, context)
    with jf.accelerate(flow, tolerance) as handle, counted(flow) as calls:
        result = case.invert(flow, y, context)
    assert handle.passes == calls
    assert calls.keys() == original.keys()
    assert all(calls[name] <= original[name] for name in original)
    return expected, result, calls, original


class Additive(nfa.AutoregressiveTransform):
    """A user's transform that defines only what the inverse takes: x = y - shift(x before it)."""

    def __init__(self, features: int, context: int | None = None, network: nn.Module | None = None) -> None:
        super().__init__(network or MADE(features, 32, context, output_multiplier=1, activation=torch.tanh))

    def _elementwise_inverse(self, inputs: Tensor, autoregressive_params: Tensor) -> tuple[Tensor, Tensor]:
        return inputs - autoregressive_params, inputs.new_zeros(len(inputs))


class Carry(nn.Module):
    """In `Additive`: x_i = y_i + c x_(i-1), of contexts c (B, 1); of y = (1, 0, ...) pass k changes entry k - 1."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return -context * nn.functional.pad(x[:, :-1], (1, 0))


class Scaled(zuko.flows.MaskedAutoregressiveTransform):
    """A user's transform of zuko that changes what it is at a context and point, not how it is inverted."""

    def meta(self, c: Tensor | None, x: Tensor) -> Any:
        return super().meta(c, 0.5 * x)


def _zuko(kind: Callable[..., nn.Module], gain: float, features: int = 24, **settings: Any) -> Case:
    build = partial(kind, hidden_features=(32, 32), transforms=2, **settings)
    return Case("zuko", build, gain, features=features)


def _nflows(kind: Callable[..., nn.Module], gain: float, **settings: Any) -> Case:
    return Case("nflows", lambda d, c: kind(d, 32, context_features=c or None, **settings), gain)


_affine, _rational = nf.MaskedAffineAutoregressiveTransform, nf.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
_spline = partial(AutoregressiveRationalQuadraticSpline, init_identity=False)

CASES = {
    "zuko MAF": _zuko(zuko.flows.MAF, 2.0),
    "zuko MAF residual": _zuko(zuko.flows.MAF, 1.2, residual=True),
    "zuko NSF": _zuko(zuko.flows.NSF, 3.0),
    "zuko NAF": _zuko(zuko.flows.NAF, 1.5, 6, signal=4, network={"hidden_features": (8,)}),  # inverts to 1e-6
    "zuko user's own": Case("zuko", lambda d, c: Scaled(d, c), 4.0),
    "nflows affine": _nflows(_affine, 1.4),
    "nflows feed-forward": _nflows(_affine, 2.5, use_residual_blocks=False),
    "nflows rational": _nflows(_rational, 4.0, num_bins=5, tails="linear", tail_bound=3.0),
    "nflows user's own": Case("nflows", lambda d, c: Additive(d, c or None), 2.5),
    "normflows affine": Case("normflows", lambda d, c: MaskedAffineAutoregressive(d, 32, c or None), 1.5),
    "normflows spline": Case("normflows", lambda d, c: _spline(d, 2, 32, c or None), 4.0, is_inverse=False),
}
MAIN = ("zuko MAF", "zuko NSF", "nflows feed-forward", "nflows rational", "normflows affine", "normflows spline")
