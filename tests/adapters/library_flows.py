"""Flows of zuko, nflows and normflows with weights that make their inverse hard, and what is common to testing them.

The oracle of `jf.accelerate` is the library itself: the same flow before it is accelerated, or a deep copy of then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import nflows.flows
import nflows.transforms
import normflows
import torch
import zuko
from nflows.transforms.autoregressive import (
    AutoregressiveTransform,
    MaskedPiecewiseCubicAutoregressiveTransform,
    MaskedPiecewiseLinearAutoregressiveTransform,
)
from nflows.transforms.made import MADE
from torch import Tensor, nn

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: Any, b: Any) -> bool:
    """Whether tensors, or tuples of them, have one dtype, shape and bits: a NaN equals itself, and 0 is not -0."""
    if not isinstance(a, Tensor):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    kind = BITS[a.itemsize]
    return torch.equal(a.detach().contiguous().view(kind), b.detach().contiguous().view(kind))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def uniform(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """In (0.02, 0.98)."""
    unit = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (0.02 + 0.96 * unit).to(dtype)


def angles(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """In (-pi, pi)."""
    return (2 * math.pi * (uniform(*shape, seed=seed, dtype=torch.float64) - 0.5)).to(dtype)


def network(module: nn.Module) -> nn.Module | None:
    """The network of a masked autoregressive transform; `None` for other modules."""
    for kind, name in (
        (zuko.flows.MaskedAutoregressiveTransform, "hyper"),
        (AutoregressiveTransform, "autoregressive_net"),
        (normflows.flows.affine.autoregressive.Autoregressive, "autoregressive_net"),
    ):
        if isinstance(module, kind):
            return getattr(module, name)
    return None


@contextmanager
def counted(flow: nn.Module) -> Iterator[dict[str, int]]:
    """Counts the calls of the networks in a flow, under the names of their transforms."""
    calls: dict[str, int] = {}

    def note(name: str, *_: Any) -> None:
        calls[name] = calls.get(name, 0) + 1

    nets = {name: net for name, module in flow.named_modules() if (net := network(module)) is not None}
    hooks = [net.register_forward_pre_hook(partial(note, name)) for name, net in nets.items()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def harder(module: nn.Module, gain: float) -> nn.Module:
    """Larger weights, so that entries depend strongly on those before; in place."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name.endswith("weight") and weight.ndim == 2:
                weight.mul_(gain)
    return module


class Additive(AutoregressiveTransform):
    """A user's transform that defines only what nflows asks of one: y = x + shift(x before it)."""

    def __init__(self, features: int, context: int | None = None) -> None:
        super().__init__(MADE(features, 32, context_features=context, output_multiplier=1, activation=torch.tanh))

    def _output_dim_multiplier(self) -> int:
        return 1

    def _elementwise_forward(self, inputs: Tensor, autoregressive_params: Tensor) -> tuple[Tensor, Tensor]:
        return inputs + autoregressive_params, inputs.new_zeros(len(inputs))

    def _elementwise_inverse(self, inputs: Tensor, autoregressive_params: Tensor) -> tuple[Tensor, Tensor]:
        return inputs - autoregressive_params, inputs.new_zeros(len(inputs))


class Carry(nn.Module):
    """Gives entry i the one before it, times the row's context (B, 1), and keeps the contexts it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.contexts: list[list[float]] = []

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        self.contexts.append(context.flatten().tolist())
        return -context * nn.functional.pad(x[:, :-1], (1, 0))


class Chain(Additive):
    """x_i = y_i + c x_(i-1): of y = (1, 0, 0, ...), pass k changes entry k - 1 only, by c^(k - 1)."""

    def __init__(self) -> None:
        AutoregressiveTransform.__init__(self, Carry())


@dataclass(frozen=True)
class Case:
    """A kind of flow: `build(features, context)`, how its slow side is called, and what goes in."""

    library: str
    build: Callable[[int, int], nn.Module]
    gain: float
    inputs: Callable[..., Tensor] = normal
    features: int = 24
    slow: str = "inverse"  # of nflows and normflows

    def make(
        self, context: int = 0, features: int | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> nn.Module:
        """In evaluation mode; the same weights at the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            flow = self.build(self.features if features is None else features, context)
        return harder(flow, self.gain).to(dtype).eval()

    def invert(self, flow: nn.Module, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, ...]:
        """The slow side: (x,) of zuko's, (x, logabsdet) of the others'."""
        if self.library == "zuko":
            return (flow(context).transform.inv(y),)
        if context is None:
            return getattr(flow, self.slow)(y)
        return getattr(flow, self.slow)(y, context=context)


HIDDEN = 32


def _zuko(kind: Callable[..., nn.Module], **settings: Any) -> Callable[[int, int], nn.Module]:
    sizes: dict[str, Any] = {"hidden_features": (HIDDEN, HIDDEN), "transforms": 2}
    return lambda features, context: kind(features, context, **(sizes | settings))


def _adjacency(features: int, context: int) -> nn.Module:
    """Each entry depends on the one three before it, and on the one seven before it: a graph of diameter D / 3."""
    i = torch.arange(features)
    gap = i[:, None] - i
    adjacency = (gap == 0) | (gap == 3) | (gap == 7)
    return zuko.flows.MAF(features, context, transforms=2, hidden_features=(64, 64), adjacency=adjacency)


def _nflows(name: Callable[..., nn.Module], **settings: Any) -> Callable[[int, int], nn.Module]:
    def build(features: int, context: int) -> nn.Module:
        return name(features=features, hidden_features=HIDDEN, context_features=context or None, **settings)

    return build


def _normed(features: int, context: int) -> nn.Module:
    """With batch normalisation whose statistics are not those of the start."""
    built = nflows.transforms.MaskedAffineAutoregressiveTransform(
        features, HIDDEN, context or None, use_batch_norm=True
    )
    with torch.no_grad():
        for module in built.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return built


def _normflows_affine(residual: bool) -> Callable[[int, int], nn.Module]:
    def build(features: int, context: int) -> nn.Module:
        return normflows.flows.MaskedAffineAutoregressive(
            features, HIDDEN, context_features=context or None, use_residual_blocks=residual
        )

    return build


def _normflows_spline(**settings: Any) -> Callable[[int, int], nn.Module]:
    def build(features: int, context: int) -> nn.Module:
        return normflows.flows.AutoregressiveRationalQuadraticSpline(
            features, 2, HIDDEN, context or None, init_identity=False, **settings
        )

    return build


def _normflows_circular(features: int, context: int) -> nn.Module:
    return normflows.flows.CircularAutoregressiveRationalQuadraticSpline(
        features, 2, HIDDEN, list(range(0, features, 2)), context or None, tail_bound=math.pi, init_identity=False
    )


_affine = nflows.transforms.MaskedAffineAutoregressiveTransform
_quadratic = nflows.transforms.MaskedPiecewiseQuadraticAutoregressiveTransform
_rational = nflows.transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform

ZUKO = {
    "MAF": Case("zuko", _zuko(zuko.flows.MAF), 2.0),
    "MAF randperm": Case("zuko", _zuko(zuko.flows.MAF, randperm=True), 2.0),
    "MAF residual": Case("zuko", _zuko(zuko.flows.MAF, residual=True), 1.2),
    "MAF tanh": Case("zuko", _zuko(zuko.flows.MAF, activation=nn.Tanh), 2.0),
    "MAF silu": Case("zuko", _zuko(zuko.flows.MAF, activation=nn.SiLU), 2.5),
    "MAF coupling": Case("zuko", _zuko(zuko.flows.MAF, passes=2), 2.0),
    "MAF five passes": Case("zuko", _zuko(zuko.flows.MAF, passes=5), 2.0),
    "MAF adjacency": Case("zuko", _adjacency, 2.0),
    "NSF": Case("zuko", _zuko(zuko.flows.NSF), 3.0),
    "NCSF": Case("zuko", _zuko(zuko.flows.NCSF), 2.0, angles),
    "SOSPF": Case("zuko", _zuko(zuko.flows.SOSPF), 1.5, features=8),
    "BPF": Case("zuko", _zuko(zuko.flows.BPF), 2.0, features=8),
    "NAF": Case("zuko", _zuko(zuko.flows.NAF, signal=4, network={"hidden_features": (8,)}), 1.5, features=6),
    "UNAF": Case("zuko", _zuko(zuko.flows.UNAF, signal=4, network={"hidden_features": (8,)}), 1.5, features=6),
}

NFLOWS = {
    "affine": Case("nflows", _nflows(_affine), 1.4),
    "affine feed-forward": Case("nflows", _nflows(_affine, use_residual_blocks=False), 2.5),
    "affine random mask": Case("nflows", _nflows(_affine, use_residual_blocks=False, random_mask=True), 2.5),
    "affine batch norm": Case("nflows", _normed, 1.4),
    "linear spline": Case("nflows", _nflows(MaskedPiecewiseLinearAutoregressiveTransform, num_bins=5), 4.0, uniform),
    "quadratic": Case("nflows", _nflows(_quadratic, num_bins=5), 4.0, uniform),
    "quadratic tails": Case("nflows", _nflows(_quadratic, num_bins=5, tails="linear", tail_bound=3.0), 4.0),
    "cubic": Case("nflows", _nflows(MaskedPiecewiseCubicAutoregressiveTransform, num_bins=5), 4.0, uniform),
    "rational": Case("nflows", _nflows(_rational, num_bins=5), 4.0, uniform),
    "rational tails": Case("nflows", _nflows(_rational, num_bins=5, tails="linear", tail_bound=3.0), 4.0),
    "user's own": Case("nflows", lambda features, context: Additive(features, context or None), 2.5),
}

NORMFLOWS = {
    "affine": Case("normflows", _normflows_affine(True), 1.5),
    "affine feed-forward": Case("normflows", _normflows_affine(False), 2.5),
    "spline": Case("normflows", _normflows_spline(), 4.0, slow="forward"),
    "spline permuted": Case("normflows", _normflows_spline(permute_mask=True), 4.0, slow="forward"),
    "circular": Case("normflows", _normflows_circular, 3.0, angles, slow="forward"),
}

CASES = {f"{case.library} {name}": case for cases in (ZUKO, NFLOWS, NORMFLOWS) for name, case in cases.items()}
WITHOUT_CONTEXT = {"normflows affine feed-forward"}  # which the library has not
MAIN = ("zuko MAF", "zuko NSF", "nflows affine feed-forward", "nflows rational tails", "normflows affine",
        "normflows spline")  # fmt: skip
