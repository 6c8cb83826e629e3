"""Random flows of the four libraries that native code takes, and their values in both directions."""

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
from nflows.transforms.made import MADE
from normflows.flows.neural_spline.autoregressive import MaskedPiecewiseRationalQuadraticAutoregressive
from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN
from torch import Tensor, nn
from torch.nn import functional as F
from zuko.flows.autoregressive import MaskedAutoregressiveTransform
from zuko.flows.spline import CircularRQSTransform
from zuko.lazy import LazyComposedTransform, LazyInverse, UnconditionalTransform

Values = tuple[Tensor, Tensor]

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


def values(flow: Any, x: Tensor, context: Tensor | None, is_inverse: bool) -> Values:
    """The values of a flow of any library, and the logarithm of the determinant of its Jacobian."""
    given = () if context is None else (context,)
    if hasattr(flow, "forward_and_log_det"):
        return (flow.inverse_and_log_det if is_inverse else flow.forward_and_log_det)(x, *given)
    if hasattr(flow, "inverse"):
        return (flow.inverse if is_inverse else flow)(x, *given)
    if hasattr(flow, "bijective"):  # pyro's; it keeps values for the tensor that it saw last
        own, x = flow.condition(context) if hasattr(flow, "condition") else flow, x.clone()
        out = own.inv(x) if is_inverse else own(x)
        log_det = own.log_abs_det_jacobian(*((out, x) if is_inverse else (x, out)))
        return out, -log_det if is_inverse else log_det
    own = flow(context)
    own = getattr(own, "transform", own)
    return (own.inv if is_inverse else own).call_and_ladj(x)


def exact(flow: nn.Module, x: Tensor, context: Tensor | None, is_inverse: bool) -> Values:
    """By the library's own code, in float64."""
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)  # in which normflows sums
        own = copy.deepcopy(flow).double()
        return values(own, x.double(), None if context is None else context.double(), is_inverse)
    finally:
        torch.set_default_dtype(default)


@st.composite
def zuko_flows(draw: Any, features: int, context: int) -> tuple[nn.Module, str]:
    domain = draw(st.sampled_from(["line", "line", "circle"]))

    def masked() -> nn.Module:
        bins = draw(st.integers(1, 6))
        settings: dict[str, Any] = {"univariate": partial(CircularRQSTransform, slope=draw(st.sampled_from([1e-3, 0.1])))}
        if domain == "line" and draw(st.booleans()):
            settings = {"univariate": partial(zuko.transforms.MonotonicRQSTransform, bound=3.0)}
        elif domain == "line":
            settings, bins = {}, 0
        if bins:
            settings["shapes"] = [(bins,), (bins,), (bins - 1,)]
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
        affine = partial(UnconditionalTransform, torch.distributions.AffineTransform)
        parts.insert(1, affine(torch.randn(features), -0.5 - torch.rand(features), buffer=draw(st.booleans())))
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
    parts = [masked(), nf.ReversePermutation(features), nf.InverseTransform(nf.CompositeTransform([masked(), masked()]))]
    if domain == "line":
        parts += [nf.CompositeTransform([nf.PointwiseAffineTransform(torch.randn(features), torch.rand(features) + 0.5)])]
        parts += [nf.AffineTransform(0.3, 1.7)]
    return nf.CompositeTransform([*parts, nf.RandomPermutation(features)]), domain


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
    if context:
        return normflows.ConditionalNormalizingFlow(None, parts), domain
    return normflows.NormalizingFlow(None, parts), domain


@st.composite
def pyro_flows(draw: Any, features: int, context: int) -> tuple[nn.Module, str]:
    hidden, bins = draw(st.lists(st.integers(features, 24), min_size=1, max_size=3)), draw(st.integers(2, 6))
    settings = {"skip_connections": draw(st.booleans()), "nonlinearity": copy.deepcopy(draw(activations))}
    network: Callable[..., nn.Module] = partial(AutoRegressiveNN, features, hidden, **settings)
    if context:
        network = partial(ConditionalAutoRegressiveNN, features, context, hidden, **settings)
    if draw(st.booleans()):
        kind = pt.ConditionalAffineAutoregressive if context else pt.AffineAutoregressive
        return kind(network(), log_scale_min_clip=-0.3, log_scale_max_clip=0.4), "line"
    kind = pt.ConditionalSplineAutoregressive if context else pt.SplineAutoregressive
    order = draw(st.sampled_from(["linear", "quadratic"]))
    sizes = [bins, bins, bins - 1, *([bins] if order == "linear" else [])]
    return kind(features, network(param_dims=sizes), count_bins=bins, bound=2.0, order=order), "line"


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
