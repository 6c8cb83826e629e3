"""Masked flows of four libraries, as they are and accelerated: `python -m benchmarks.masked_flows`.

Writes docs/results/masked-flows.json, in about 20 minutes on two cores that are otherwise idle. A file from the same
machine and versions is completed, so that a run can be interrupted; remove it to measure all anew.

Each flow has five transforms, the random weights of its library, and one context of four features for all rows. The
slow direction of a flow makes a pass of its network for each feature: sampling, or the density in some flows of
normflows and pyro. Sampling is timed without its random numbers, from latents. The fast direction has standard normal
inputs; the slow one has what the fast one makes of them.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from time import perf_counter
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

import jacobiflow as jf
from benchmarks.common import RESULTS, complete, speed_up
from jacobiflow.memory import keep_freed_memory

OUT = RESULTS / "masked-flows.json"
TRANSFORMS, CONTEXT = 5, 4
HIDDEN, ROWS = 50, (1, 100, 10_000)
WIDE, WIDE_HIDDEN, WIDE_ROWS = 784, 512, (1, 64)
MILLION = {("MAF", "fast"): 20, ("NSF", "fast"): 5, ("MAF", "slow"): 5}  # features of 10^6 rows
ERROR_ROWS, ERROR_FEATURES = 100, 64  # up to which errors are measured
LEAST, MOST, SECONDS = 3, 30, 1.0  # rounds, and what they may take of the library's time

Build = Callable[[int, int, int], nn.Module]
Call = Callable[[Tensor], Tensor]


def zuko_flow(kind: Callable[..., nn.Module], features: int, hidden: int, context: int) -> nn.Module:
    """A flow of zuko."""
    return kind(features, context, transforms=TRANSFORMS, hidden_features=(hidden, hidden))


def nflows_flow(kind: Callable[..., nn.Module], features: int, hidden: int, context: int) -> nn.Module:
    """A flow of nflows as sbi builds it, with its order reversed between transforms."""
    layers: list[nn.Module] = []
    for _ in range(TRANSFORMS):
        masked = kind(features, hidden, context_features=context or None, use_residual_blocks=False)
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
    """An affine transform, whose slow direction is the density."""
    return normflows.flows.MaskedAffineAutoregressive(features, hidden, context, num_blocks)


def normflows_nsf(features: int, num_blocks: int, context: int, hidden: int) -> nn.Module:
    """A spline transform, whose slow direction is sampling."""
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
}
FEATURES = {"MAF": (2, 5, 10, 20, 64), "NSF": (2, 5, 10, 20), "linear spline": (2, 5, 10)}
SLOW_DENSITY = {("normflows", "MAF"), ("pyro", "MAF"), ("pyro", "NSF"), ("pyro", "linear spline")}
PACKAGES = {"zuko": "zuko", "nflows": "nflows", "normflows": "normflows", "pyro": "pyro-ppl"}


def random_flow(library: str, kind: str, features: int, hidden: int) -> nn.Module:
    """A flow with random weights, the same each time."""
    torch.manual_seed(0)
    return FLOWS[library, kind](features, hidden, CONTEXT).requires_grad_(False).eval()


def calls(flow: Any, context: Tensor | None, rows: int) -> dict[str, Call]:
    """A flow's sampling from latents, its density, and latents if they are the fast direction, at one context.

    Flows of zuko and nflows may have no context.
    """
    if isinstance(flow, zuko.flows.Flow):
        return {
            "sampling": lambda z: flow(context).transform.inv(z),
            "density": lambda x: flow(context).log_prob(x),
            "latents": lambda x: flow(context).transform(x),
        }
    repeated = None if context is None else context.repeat(rows, 1)
    if isinstance(flow, nflows.flows.Flow):
        return {
            "sampling": lambda z: flow._transform.inverse(z, repeated)[0],
            "density": partial(flow.log_prob, context=repeated),
            "latents": partial(flow.transform_to_noise, context=repeated),
        }
    if isinstance(flow, normflows.NormalizingFlow):
        methods = {"sampling": flow.forward, "density": flow.log_prob, "latents": flow.inverse}
        return {name: partial(method, context=repeated) for name, method in methods.items()}
    assert context is not None
    zeros = context.new_zeros(flow[0].nn.input_dim)
    base = pyro.Normal(zeros, zeros + 1).to_event(1)
    conditioned = pyro.ConditionalTransformedDistribution(base, list(flow)).condition(context)

    def sampling(z: Tensor) -> Tensor:
        for transform in conditioned.transforms:
            z = transform(z[:])
        return z

    # pyro returns what it has for the tensor that it saw last; a view is another tensor
    return {"sampling": sampling, "density": lambda x: conditioned.log_prob(x[:])}


def measure(key: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of one direction, by the library and accelerated, and the root mean square errors of few rows."""
    library, kind, features, rows = (key[name] for name in ("library", "flow", "features", "rows"))
    slow, fast = ("density", "sampling") if (library, kind) in SLOW_DENSITY else ("sampling", "density")
    call = slow if key["direction"] == "slow" else fast
    flow = random_flow(library, kind, features, key["hidden"])
    accelerated = copy.deepcopy(flow)
    handle = jf.accelerate(accelerated)
    torch.manual_seed(1)
    context, inputs = torch.randn(CONTEXT), torch.randn(rows, features)
    if key["direction"] == "slow":
        inputs = calls(flow, context, rows)["latents" if call == "sampling" else "sampling"](inputs)
    runs = {
        name: partial(calls(each, context, rows)[call], inputs)
        for name, each in (("library", flow), ("accelerated", accelerated))
    }
    with torch.no_grad():
        figures, answers = speed_up(runs, LEAST if rows > ROWS[-1] else rounds(runs["library"]))
        if rows <= ERROR_ROWS and features <= ERROR_FEATURES:
            exact = calls(copy.deepcopy(flow).double(), context.double(), rows)[call](inputs.double())
            figures["error"] = {name: float((each - exact).square().mean().sqrt()) for name, each in answers.items()}
    return {"call": call, **figures, "ways": sorted(set(handle.ways.values()))}


def rounds(run: Callable[[], Any]) -> int:
    """As many rounds as `SECONDS` allow, within limits."""
    started = perf_counter()
    run()
    return min(MOST, max(LEAST, int(SECONDS / (perf_counter() - started))))


def keys() -> Iterator[dict[str, Any]]:
    """All that is measured, what takes longest last."""
    for library, kind in FLOWS:
        for features in FEATURES[kind]:
            yield from _keys(library, kind, features, HIDDEN, ROWS)
    for library in ("zuko", "nflows"):
        yield from _keys(library, "MAF", WIDE, WIDE_HIDDEN, WIDE_ROWS)
    for (kind, direction), most in MILLION.items():
        for features in FEATURES[kind]:
            if features <= most:
                yield from _keys("zuko", kind, features, HIDDEN, (1_000_000,), (direction,))


def _keys(
    library: str, kind: str, features: int, hidden: int, rows: tuple[int, ...],
    directions: tuple[str, ...] = ("slow", "fast"),
) -> Iterator[dict[str, Any]]:  # fmt: skip
    for count in rows:
        for direction in directions:
            yield {
                "library": library, "version": version(PACKAGES[library]), "flow": kind, "features": features,
                "hidden": hidden, "rows": count, "direction": direction,
            }  # fmt: skip


def show(run: Mapping[str, Any]) -> None:
    """One line of progress."""
    text = ", ".join(f"{name} {timing['median'] * 1e3:.3g} ms" for name, timing in run["seconds"].items())
    print(
        f"{run['library']} {run['flow']}, {run['features']} features, {run['rows']:,} rows, {run['call']}: {text}, "
        f"{run['speed_up']:.1f}x, {', '.join(run['ways'])}, errors {run.get('error')}", file=sys.stderr
    )  # fmt: skip


if __name__ == "__main__":
    keep_freed_memory()
    complete(OUT, keys(), measure, show)
