"""Masked flows of four libraries, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import nflows.distributions
import nflows.flows
import nflows.transforms
import normflows
import pyro.distributions as pyro
import torch
import zuko
from pyro.distributions import transforms as pyro_transforms
from pyro.nn import ConditionalAutoRegressiveNN
from torch import Tensor, nn

TRANSFORMS = 5
CLIP = 5.0  # the largest norm of a gradient
PACKAGES = {"zuko": "zuko", "nflows": "nflows", "normflows": "normflows", "pyro": "pyro-ppl"}

Build = Callable[[int, int, int], nn.Module]
Call = Callable[[Tensor], Tensor]


def zuko_flow(kind: Callable[..., nn.Module], features: int, hidden: int, context: int) -> nn.Module:
    return kind(features, context, transforms=TRANSFORMS, hidden_features=(hidden, hidden))


def nflows_flow(kind: Callable[..., nn.Module], features: int, hidden: int, context: int) -> nn.Module:
    """A flow of nflows as sbi builds it, with its order reversed between transforms."""
    layers: list[nn.Module] = []
    for _ in range(TRANSFORMS):
        masked = kind(features, hidden, context_features=context, use_residual_blocks=False)
        layers += [masked, nflows.transforms.ReversePermutation(features)]
    base = nflows.distributions.StandardNormal([features])
    return nflows.flows.Flow(nflows.transforms.CompositeTransform(layers), base)


def normflows_flow(kind: Callable[..., nn.Module], features: int, hidden: int, context: int) -> nn.Module:
    """A flow of normflows, with features shuffled between transforms."""
    layers: list[nn.Module] = []
    for _ in range(TRANSFORMS):
        layers += [kind(features, num_blocks=2, context=context, hidden=hidden), normflows.flows.Permute(features)]
    base = normflows.distributions.DiagGaussian(features, trainable=False)
    return normflows.ConditionalNormalizingFlow(base, layers)


def normflows_maf(features: int, num_blocks: int, context: int, hidden: int) -> nn.Module:
    return normflows.flows.MaskedAffineAutoregressive(features, hidden, context, num_blocks)


def normflows_nsf(features: int, num_blocks: int, context: int, hidden: int) -> nn.Module:
    kind = normflows.flows.AutoregressiveRationalQuadraticSpline
    return kind(features, num_blocks, hidden, num_context_channels=context, init_identity=False)


def pyro_flow(kind: Callable[..., nn.Module], features: int, hidden: int, context: int) -> nn.Module:
    """Transforms of pyro, each with an order of its own. pyro takes no fewer hidden units than features."""
    sizes = [max(hidden, features)] * 2
    return nn.ModuleList(kind(features, context, hidden_dims=sizes) for _ in range(TRANSFORMS))


def pyro_nsf(features: int, context: int, hidden_dims: list[int]) -> nn.Module:
    """A rational-quadratic spline, which has no lambdas: pyro's own helper makes a network for them too."""
    bins = 8
    network = ConditionalAutoRegressiveNN(features, context, hidden_dims, param_dims=[bins, bins, bins - 1])
    return pyro_transforms.ConditionalSplineAutoregressive(features, network, count_bins=bins, order="quadratic")


FLOWS: dict[tuple[str, str], Build] = {
    ("zuko", "MAF"): partial(zuko_flow, zuko.flows.MAF),
    ("zuko", "NSF"): partial(zuko_flow, zuko.flows.NSF),
    ("nflows", "MAF"): partial(nflows_flow, nflows.transforms.MaskedAffineAutoregressiveTransform),
    ("nflows", "NSF"): partial(
        nflows_flow,
        partial(
            nflows.transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform, tails="linear", tail_bound=3.0
        ),
    ),
    ("normflows", "MAF"): partial(normflows_flow, normflows_maf),
    ("normflows", "NSF"): partial(normflows_flow, normflows_nsf),
    ("pyro", "MAF"): partial(pyro_flow, pyro_transforms.conditional_affine_autoregressive),
    ("pyro", "NSF"): partial(pyro_flow, pyro_nsf),
    ("pyro", "linear spline"): partial(pyro_flow, pyro_transforms.conditional_spline_autoregressive),
    ("zuko", "MAF(passes=2)"): partial(zuko_flow, partial(zuko.flows.MAF, passes=2)),
    ("zuko", "NSF(passes=2)"): partial(zuko_flow, partial(zuko.flows.NSF, passes=2)),
    ("zuko", "NICE"): partial(zuko_flow, zuko.flows.NICE),
    ("zuko", "SOSPF"): partial(zuko_flow, zuko.flows.SOSPF),
    ("zuko", "BPF"): partial(zuko_flow, zuko.flows.BPF),
    ("zuko", "NAF"): partial(zuko_flow, zuko.flows.NAF),
    ("zuko", "UNAF"): partial(zuko_flow, zuko.flows.UNAF),
}


def log_prob(flow: Any, x: Tensor, context: Tensor) -> Tensor:
    """Log-densities of rows `x` (N, D) at a context for each row, or one for all if the flow is zuko's or pyro's."""
    if isinstance(flow, zuko.flows.Flow):
        return flow(context).log_prob(x)
    if isinstance(flow, nn.ModuleList):
        return _conditioned(flow, context).log_prob(x[:])
    return flow.log_prob(x, context)


def training_step(flow: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, context: Tensor) -> None:
    """zero_grad, the loss, its gradients, clipping and the optimizer's step."""
    optimizer.zero_grad()
    (-log_prob(flow, x, context).mean()).backward()
    nn.utils.clip_grad_norm_(flow.parameters(), CLIP)
    optimizer.step()


def _conditioned(transforms: Any, context: Tensor) -> Any:
    """The distribution of pyro's transforms. Its results are kept for the last tensor, so that callers pass views."""
    zeros = context.new_zeros(transforms[0].nn.input_dim)
    base = pyro.Normal(zeros, zeros + 1).to_event(1)
    return pyro.ConditionalTransformedDistribution(base, list(transforms)).condition(context)


def calls(flow: Any, context: Tensor, rows: int) -> dict[str, Call]:
    """A flow's sampling from latents, its density, and latents if they are the fast direction, at one context."""
    if isinstance(flow, zuko.flows.Flow):
        return {
            "sampling": lambda z: flow(context).transform.inv(z),
            "density": lambda x: log_prob(flow, x, context),
            "latents": lambda x: flow(context).transform(x),
        }
    if isinstance(flow, nn.ModuleList):
        transforms = _conditioned(flow, context).transforms

        def sampling(z: Tensor) -> Tensor:
            for transform in transforms:
                z = transform(z[:])
            return z

        return {"sampling": sampling, "density": lambda x: log_prob(flow, x, context)}
    repeated = context.repeat(rows, 1)
    if isinstance(flow, nflows.flows.Flow):
        return {
            "sampling": lambda z: flow._transform.inverse(z, repeated)[0],
            "density": lambda x: log_prob(flow, x, repeated),
            "latents": partial(flow.transform_to_noise, context=repeated),
        }
    methods = {"sampling": flow.forward, "density": flow.log_prob, "latents": flow.inverse}
    return {name: partial(method, context=repeated) for name, method in methods.items()}
