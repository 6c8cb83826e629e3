"""Flows of the four libraries that native code takes, and their values in both directions."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import nflows.transforms as nf
import normflows
import pyro.distributions.transforms as pt
import torch
import zuko
from hypothesis import strategies as st
from normflows.flows.neural_spline.autoregressive import MaskedPiecewiseRationalQuadraticAutoregressive
from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN
from torch import Tensor, nn
from torch.nn import functional as F
from zuko.flows.autoregressive import MaskedAutoregressiveTransform
from zuko.flows.spline import CircularRQSTransform
from zuko.lazy import LazyComposedTransform, LazyInverse, UnconditionalTransform

import jacobiflow as jf

Values = tuple[Tensor, Tensor]
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

torch.distributions.Distribution.set_default_validate_args(False)  # as zuko has it; importing pyro turns checks on

MODULES = [
    nn.ReLU(), nn.LeakyReLU(0.3), nn.ELU(0.7), nn.SELU(), nn.Tanh(), nn.Sigmoid(), nn.SiLU(), nn.GELU(),
    nn.GELU(approximate="tanh"), nn.Softplus(2.0, 1.5), nn.Softplus(), nn.Identity(),
]  # fmt: skip
FUNCTIONS: list[Callable[..., Tensor]] = [
    F.relu, torch.relu, F.leaky_relu, F.elu, F.selu, torch.selu, F.tanh, torch.tanh, F.sigmoid, torch.sigmoid, F.silu,
    F.gelu, F.softplus,
]  # fmt: skip
activations = st.sampled_from(MODULES)
functions = st.sampled_from([*MODULES, *FUNCTIONS])


def same_bits(a: Any, b: Any) -> bool:
    """True if tensors, or tuples of them, have one dtype, shape and bits: a NaN equals itself, and 0 is not -0."""
    if not isinstance(a, Tensor):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    kind = BITS[a.itemsize]
    return torch.equal(a.detach().contiguous().view(kind), b.detach().contiguous().view(kind))


def values(flow: Any, x: Tensor, context: Tensor | None, is_inverse: bool) -> Values:
    """The values of a flow of any library, and the logarithm of the determinant of its Jacobian."""
    arguments = () if context is None else (context,)
    if hasattr(flow, "forward_and_log_det"):
        return (flow.inverse_and_log_det if is_inverse else flow.forward_and_log_det)(x, *arguments)
    if hasattr(flow, "inverse"):
        return (flow.inverse if is_inverse else flow)(x, *arguments)
    if hasattr(flow, "bijective"):  # pyro's; it keeps values for the tensor that it saw last
        original, x = flow.condition(context) if hasattr(flow, "condition") else flow, x.clone()
        out = original.inv(x) if is_inverse else original(x)
        log_det = original.log_abs_det_jacobian(*((out, x) if is_inverse else (x, out)))
        return out, -log_det if is_inverse else log_det
    original = flow(context)
    original = getattr(original, "transform", original)
    return (original.inv if is_inverse else original).call_and_ladj(x)


def exact(flow: nn.Module, x: Tensor, context: Tensor | None, is_inverse: bool) -> Values:
    """By the library's own code, in float64."""
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)  # in which normflows sums
        original = copy.deepcopy(flow).double()
        return values(original, x.double(), None if context is None else context.double(), is_inverse)
    finally:
        torch.set_default_dtype(default)


@st.composite
def zuko_flows(draw: Any, features: int, context: int) -> tuple[nn.Module, str]:
    domain = draw(st.sampled_from(["line", "line", "circle"]))

    def masked() -> nn.Module:
        bins = draw(st.integers(1, 6))
        spline = partial(zuko.transforms.MonotonicRQSTransform, bound=3.0) if domain == "line" else CircularRQSTransform
        settings: dict[str, Any] = {}
        if domain == "circle" or draw(st.booleans()):
            settings = {"univariate": partial(spline, slope=0.01), "shapes": [(bins,), (bins,), (bins - 1,)]}
        order = torch.randperm(features)
        if draw(st.booleans()):
            earlier = (torch.rand(features, features) < 0.6).tril(-1)
            earlier[1, 0] = True
            settings["adjacency"] = (earlier | torch.eye(features, dtype=torch.bool))[order][:, order]
        else:
            settings |= {"order": order, "passes": draw(st.integers(2, features + 1))}
        activation = draw(activations)
        return MaskedAutoregressiveTransform(
            features, context, hidden_features=draw(st.lists(st.integers(features, 24), min_size=1, max_size=3)),
            activation=lambda: copy.deepcopy(activation), residual=draw(st.booleans()), **settings,
        )  # fmt: skip

    if draw(st.booleans()):
        return masked(), domain
    permutation = UnconditionalTransform(zuko.transforms.PermutationTransform, torch.randperm(features), buffer=True)
    parts = [masked(), permutation, LazyInverse(LazyComposedTransform(masked(), masked()))]
    if domain == "line":
        affine, numbers = torch.distributions.AffineTransform, (torch.randn(features), -0.5 - torch.rand(features))
        parts.insert(1, UnconditionalTransform(affine, *numbers, buffer=draw(st.booleans())))
    return LazyComposedTransform(*parts), domain


@st.composite
def nflows_flows(draw: Any, features: int, context: int) -> tuple[nn.Module, str]:
    domain = draw(st.sampled_from(["line", "line", "unit"]))

    def masked() -> nn.Module:
        settings: dict[str, Any] = {
            "activation": draw(functions), "num_blocks": draw(st.integers(1, 2)), "context_features": context or None,
            "use_residual_blocks": draw(st.booleans()),
        }  # fmt: skip
        if not settings["use_residual_blocks"]:
            settings["random_mask"] = draw(st.booleans())
        hidden = draw(st.integers(features, 24))
        if domain == "line" and draw(st.booleans()):
            return nf.MaskedAffineAutoregressiveTransform(features, hidden, **settings)
        tails = {"tails": "linear", "tail_bound": 2.5} if domain == "line" else {}
        return nf.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
            features, hidden, num_bins=draw(st.integers(2, 6)), **tails, **settings
        )

    if draw(st.booleans()):
        return masked(), domain
    inner = nf.InverseTransform(nf.CompositeTransform([masked(), nf.ReversePermutation(features), masked()]))
    parts = [masked(), inner, nf.RandomPermutation(features)]
    if domain == "line":
        parts += [nf.AffineTransform(0.3, 1.7), nf.PointwiseAffineTransform(*torch.rand(2, features) + 0.5)]
    return nf.CompositeTransform(parts), domain


@st.composite
def normflows_flows(draw: Any, features: int, context: int) -> tuple[nn.Module, str]:
    domain = draw(st.sampled_from(["line", "line", "unit"]))

    def masked() -> nn.Module:
        hidden, blocks = draw(st.integers(features, 24)), draw(st.integers(1, 2))
        settings: dict[str, Any] = {"context_features": context or None, "num_blocks": blocks}
        kind = draw(st.sampled_from(["affine", "spline", "circular"])) if domain == "line" else "unit"
        if kind == "affine":
            settings["use_residual_blocks"] = context > 0 or draw(st.booleans())
            return normflows.flows.MaskedAffineAutoregressive(features, hidden, activation=draw(functions), **settings)
        if kind == "spline":
            return normflows.flows.AutoregressiveRationalQuadraticSpline(
                features, blocks, hidden, context or None, tail_bound=2, init_identity=False,
                permute_mask=draw(st.booleans()),
            )  # fmt: skip
        tails = {"tails": "circular", "tail_bound": 2.0} if kind == "circular" else {}
        return MaskedPiecewiseRationalQuadraticAutoregressive(
            features, hidden, num_bins=draw(st.integers(2, 6)), init_identity=False, activation=draw(functions),
            **tails, **settings,
        )  # fmt: skip

    if draw(st.booleans()):
        return masked(), domain
    parts = [masked(), normflows.flows.Permute(features, draw(st.sampled_from(["shuffle", "swap"]))), masked()]
    return (normflows.ConditionalNormalizingFlow if context else normflows.NormalizingFlow)(None, parts), domain


@st.composite
def pyro_flows(draw: Any, features: int, context: int) -> tuple[nn.Module, str]:
    hidden, bins = draw(st.lists(st.integers(features, 24), min_size=1, max_size=3)), draw(st.integers(2, 6))
    settings = {"skip_connections": draw(st.booleans()), "nonlinearity": copy.deepcopy(draw(activations))}
    network: Any = partial(AutoRegressiveNN, features, hidden, **settings)
    affine, spline = pt.AffineAutoregressive, pt.SplineAutoregressive
    if context:
        network = partial(ConditionalAutoRegressiveNN, features, context, hidden, **settings)
        affine, spline = pt.ConditionalAffineAutoregressive, pt.ConditionalSplineAutoregressive
    if draw(st.booleans()):
        return affine(network(), log_scale_min_clip=-0.3, log_scale_max_clip=0.4), "line"
    order = draw(st.sampled_from(["linear", "quadratic"]))
    sizes = [bins, bins, bins - 1, *([bins] if order == "linear" else [])]
    return spline(features, network(param_dims=sizes), count_bins=bins, bound=2.0, order=order), "line"


FLOWS = {"zuko": zuko_flows, "nflows": nflows_flows, "normflows": normflows_flows, "pyro": pyro_flows}


def inputs(domain: str, *shape: int, dtype: torch.dtype) -> Tensor:
    """On the line, the circle, or between 0 and 1."""
    if domain == "line":
        return 1.5 * torch.randn(shape, dtype=dtype)
    return torch.rand(shape, dtype=dtype) if domain == "unit" else (2 * torch.rand(shape, dtype=dtype) - 1) * math.pi


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same entries, or for "expanded" the first row again and again, with other strides."""
    if layout == "expanded" and x.ndim > 1 and len(x):
        return x[:1].expand(x.shape)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return torch.stack([x, x], dim=-1)[..., 0] if layout == "strided" else x


def gaps(result: Values, expected: Values, period: float) -> list[Tensor]:
    """Errors of the values, on a circle if there is a period, and of the log-determinants."""
    error = (result[0] - expected[0]).abs()
    return [torch.minimum(error, (error - period).abs()), (result[1] - expected[1]).abs()]


def check(flow: nn.Module, x: Tensor, context: Tensor | None, domain: str = "line", threads: int = 1) -> None:
    """Both directions, against the library in float64 and, for float32, the errors that it makes itself."""
    period = 2 * math.pi if domain == "circle" else 0.0
    for is_inverse in (False, True):
        expected = exact(flow, x, context, is_inverse)
        original = expected
        if x.dtype == torch.float32:  # with float64 pyro needs another default type
            original = values(flow, x, context, is_inverse)
            with jf.accelerate(flow, 0.0):
                assert same_bits(original, values(flow, x, context, is_inverse))
        torch.set_num_threads(threads)  # here alone: those of PyTorch would cost time
        with jf.accelerate(flow) as handle:
            result = values(flow, x, context, is_inverse)
        torch.set_num_threads(1)
        assert set(handle.ways.values()) == {"native"}, handle
        assert [part.shape for part in result] == [part.shape for part in original]
        assert all(part.dtype == x.dtype for part in result)
        pairs = zip(gaps(result, expected, period), gaps(original, expected, period), expected, strict=True)
        for error, error_of_library, answer in pairs:
            if x.dtype == torch.float64:
                assert error.max() <= 1e-10 * (1 + answer.abs().max())
            else:
                floor = (1e-6 + 2e-5 / len(x)) * (1 + answer.abs().mean())  # a single row is no statistic
                assert error.mean() <= 2 * error_of_library.mean() + floor


def steep(flow: nn.Module, gain: float = 1.5) -> nn.Module:
    """In evaluation mode, with weights so large that entries depend strongly on those before."""
    for weight in flow.parameters():
        if weight.ndim == 2:
            weight *= gain
    return flow.eval()


# Features of which there are more than a block has, and the flow of them, with contexts of two numbers.
_spline = partial(normflows.flows.AutoregressiveRationalQuadraticSpline, init_identity=False)
LARGE: dict[str, tuple[int, Callable[[int], nn.Module]]] = {
    "zuko": (50, lambda d: zuko.flows.NSF(d, 2, hidden_features=(100, 100), transforms=2)),
    "zuko residual": (40, lambda d: zuko.flows.MAF(d, 2, hidden_features=(70, 70), residual=True, randperm=True)),
    "nflows": (70, lambda d: nf.MaskedAffineAutoregressiveTransform(d, 100, context_features=2)),
    "normflows": (50, lambda d: _spline(d, 2, 100, 2)),
    "pyro": (50, lambda d: pt.conditional_spline_autoregressive(d, 2, [100, 80])),
}

# Flows of six features with contexts of two numbers.
SMALL: dict[str, Callable[[], nn.Module]] = {
    "zuko MAF": lambda: zuko.flows.MAF(6, 2).transform, "zuko NSF": lambda: zuko.flows.NSF(6, 2).transform,
    "nflows": lambda: nf.MaskedAffineAutoregressiveTransform(6, 16, context_features=2),
    "nflows spline": lambda: nf.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
        6, 16, context_features=2, tails="linear"
    ),
    "normflows": lambda: normflows.flows.MaskedAffineAutoregressive(6, 16, context_features=2),
    "pyro": lambda: pt.conditional_affine_autoregressive(6, 2, [16]),
    "pyro spline": lambda: pt.conditional_spline_autoregressive(6, 2, [16]),
}  # fmt: skip
