"""Random flows of zuko, nflows, glasflow, normflows and pyro, drawn by hypothesis."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import glasflow.nflows.transforms as gf
import nflows.transforms as nf
import normflows
import pyro.distributions.transforms as pt
import torch
import zuko
from hypothesis import strategies as st
from normflows.flows.neural_spline.autoregressive import MaskedPiecewiseRationalQuadraticAutoregressive
from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN, ConditionalDenseNN, DenseNN
from torch import Tensor, nn
from torch.nn import functional as F
from zuko.flows.autoregressive import MaskedAutoregressiveTransform
from zuko.flows.coupling import GeneralCouplingTransform
from zuko.flows.spline import CircularRQSTransform
from zuko.lazy import LazyComposedTransform, LazyInverse, UnconditionalTransform

from tests.helpers.library_flows import coupling_net

Draw = Callable[[st.SearchStrategy[Any]], Any]

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


def zuko_flows(draw: Draw, features: int, context: int) -> tuple[nn.Module, str]:
    domain = draw(st.sampled_from(["line", "line", "circle"]))

    def masked() -> nn.Module:
        bins = draw(st.integers(1, 6))
        spline = partial(zuko.transforms.MonotonicRQSTransform, bound=3.0) if domain == "line" else CircularRQSTransform
        settings: dict[str, Any] = {}
        kind = draw(st.sampled_from(["affine", "spline", "bernstein", "squares"])) if domain == "line" else "spline"
        if kind == "spline":
            settings = {"univariate": partial(spline, slope=0.01), "shapes": [(bins,), (bins,), (bins - 1,)]}
        elif kind == "bernstein":
            bernstein = partial(zuko.transforms.BoundedBernsteinTransform, bound=2.5, eps=1e-12)
            settings = {"univariate": bernstein, "shapes": [(bins + 1,)]}
        elif kind == "squares":
            squares = partial(zuko.flows.polynomial.ShiftedSOSPTransform, slope=0.05)
            settings = {"univariate": squares, "shapes": [(draw(st.integers(1, 3)), bins), ()]}
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

    def coupling() -> nn.Module:
        bins, settings = draw(st.integers(1, 6)), dict[str, Any]()
        if draw(st.booleans()):
            spline = partial(zuko.transforms.MonotonicRQSTransform, bound=3.0)
            settings = {"univariate": spline, "shapes": [(bins,), (bins,), (bins - 1,)]}
        mask, activation = torch.randperm(features) % 2 == 0, draw(activations)
        return GeneralCouplingTransform(
            features, context, mask, activation=lambda: copy.deepcopy(activation),
            hidden_features=draw(st.lists(st.integers(1, 24), max_size=3)), **settings,
        )  # fmt: skip

    if domain == "line" and draw(st.booleans()):
        return LazyComposedTransform(
            coupling(), LazyInverse(coupling()), *([masked()] * draw(st.integers(0, 1)))
        ), domain
    if draw(st.booleans()):
        return masked(), domain
    permutation = UnconditionalTransform(zuko.transforms.PermutationTransform, torch.randperm(features), buffer=True)
    parts = [masked(), permutation, LazyInverse(LazyComposedTransform(masked(), masked()))]
    if domain == "line":
        affine, numbers = torch.distributions.AffineTransform, (torch.randn(features), -0.5 - torch.rand(features))
        parts.insert(1, UnconditionalTransform(affine, *numbers, buffer=draw(st.booleans())))
        parts.insert(0, UnconditionalTransform(zuko.transforms.SoftclipTransform, bound=11.0))
    return LazyComposedTransform(*parts), domain


def nflows_flows(nf: Any, draw: Draw, features: int, context: int) -> tuple[nn.Module, str]:
    domain = draw(st.sampled_from(["line", "line", "unit"]))

    def masked() -> nn.Module:
        settings: dict[str, Any] = {
            "activation": draw(functions), "num_blocks": draw(st.integers(1, 2)), "context_features": context or None,
            "use_residual_blocks": draw(st.booleans()),
        }  # fmt: skip
        hidden = draw(st.integers(features, 24))
        if domain == "line" and draw(st.booleans()):
            return nf.MaskedAffineAutoregressiveTransform(features, hidden, **settings)
        tails = {"tails": "linear", "tail_bound": 2.5} if domain == "line" else {}
        return nf.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
            features, hidden, num_bins=draw(st.integers(2, 6)), **tails, **settings
        )

    def coupling() -> nn.Module:
        mask = torch.randperm(features) % draw(st.integers(2, 3))
        settings = {"num_blocks": draw(st.integers(0, 2)), "activation": draw(functions)}
        net = partial(coupling_net, hidden=draw(st.integers(1, 24)), context=context, library=nf, **settings)
        if domain == "line" and draw(st.booleans()):
            return nf.AffineCouplingTransform(mask, net)
        tails = {"tails": "linear", "tail_bound": 2.5} if domain == "line" else {}
        return nf.PiecewiseRationalQuadraticCouplingTransform(mask, net, num_bins=draw(st.integers(2, 6)), **tails)

    if features > 1 and draw(st.booleans()):
        linear = [nf.LULinear(features, identity_init=draw(st.booleans()))] if domain == "line" else []
        return nf.CompositeTransform([coupling(), *linear, nf.InverseTransform(coupling()), masked()]), domain
    if draw(st.booleans()):
        return masked(), domain
    inner = nf.InverseTransform(nf.CompositeTransform([masked(), nf.ReversePermutation(features), masked()]))
    parts = [masked(), inner, nf.RandomPermutation(features)]
    if domain == "line":
        parts += [nf.AffineTransform(0.3, 1.7), nf.PointwiseAffineTransform(*torch.rand(2, features) + 0.5)]
    return nf.CompositeTransform(parts), domain


def normflows_flows(draw: Draw, features: int, context: int) -> tuple[nn.Module, str]:
    domain = draw(st.sampled_from(["line", "line", "unit"]))

    def masked() -> nn.Module:
        hidden = draw(st.integers(features, 24))
        settings: dict[str, Any] = {"context_features": context or None, "num_blocks": draw(st.integers(1, 2))}
        if domain == "line" and draw(st.booleans()):
            settings["use_residual_blocks"] = context > 0 or draw(st.booleans())
            return normflows.flows.MaskedAffineAutoregressive(features, hidden, activation=draw(functions), **settings)
        tails = {"tails": "circular", "tail_bound": 2.0} if domain == "line" else {}
        return MaskedPiecewiseRationalQuadraticAutoregressive(
            features, hidden, num_bins=draw(st.integers(2, 6)), init_identity=False, activation=draw(functions),
            **tails, **settings,
        )  # fmt: skip

    if draw(st.booleans()):
        return masked(), domain
    parts = [masked(), normflows.flows.Permute(features, draw(st.sampled_from(["shuffle", "swap"]))), masked()]
    return (normflows.ConditionalNormalizingFlow if context else normflows.NormalizingFlow)(None, parts), domain


def pyro_flows(draw: Draw, features: int, context: int) -> tuple[nn.Module, str]:
    hidden, bins = draw(st.lists(st.integers(features, 24), min_size=1, max_size=3)), draw(st.integers(2, 6))
    settings = {"skip_connections": draw(st.booleans()), "nonlinearity": copy.deepcopy(draw(activations))}
    network: Any = partial(AutoRegressiveNN, features, hidden, **settings)
    affine, spline = pt.AffineAutoregressive, pt.SplineAutoregressive
    if context:
        network = partial(ConditionalAutoRegressiveNN, features, context, hidden, **settings)
        affine, spline = pt.ConditionalAffineAutoregressive, pt.ConditionalSplineAutoregressive
    order, clips = (
        draw(st.sampled_from(["linear", "quadratic"])),
        {"log_scale_min_clip": -0.3, "log_scale_max_clip": 0.4},
    )
    sizes = [bins, bins, bins - 1, *([bins] if order == "linear" else [])]
    kind = draw(st.sampled_from(["affine", "spline", "coupling"]))
    if kind == "coupling" and features > 1:
        split = draw(st.integers(1, features - 1))
        rest, function = features - split, settings["nonlinearity"]
        if context:
            dense: Any = ConditionalDenseNN(split, context, hidden, [rest, rest], function)
            return pt.ConditionalAffineCoupling(split, dense, **clips), "line"
        if draw(st.booleans()):
            return pt.AffineCoupling(split, DenseNN(split, hidden, [rest, rest], function), **clips), "line"
        dense = DenseNN(split, hidden, [rest * size for size in sizes], function)
        return pt.SplineCoupling(features, split, dense, bins, 2.0, order, identity=draw(st.booleans())), "line"
    if kind == "affine":
        return affine(network(), **clips), "line"
    return spline(features, network(param_dims=sizes), count_bins=bins, bound=2.0, order=order), "line"


FLOWS = {
    "zuko": zuko_flows,
    "nflows": partial(nflows_flows, nf),
    "glasflow": partial(nflows_flows, gf),
    "normflows": normflows_flows,
    "pyro": pyro_flows,
}


def inputs(domain: str, *shape: int, dtype: torch.dtype) -> Tensor:
    """On the line, the circle, or between 0 and 1."""
    if domain == "line":
        return 1.5 * torch.randn(shape, dtype=dtype)
    return torch.rand(shape, dtype=dtype) if domain == "unit" else (2 * torch.rand(shape, dtype=dtype) - 1) * math.pi
