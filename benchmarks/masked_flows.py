"""Times masked flows of four libraries, as they are and accelerated: `python -m benchmarks.masked_flows`.

Writes docs/results/masked-flows.json, which fills docs/flows.md and docs/libraries.md, in about half an hour on two
idle cores. Flows have five transforms, random weights, and one context of four features for all rows. Their slow
direction makes a pass of the network for each feature: sampling, or the density in some flows of normflows and pyro.
Sampling is timed without its random numbers, from latents.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from itertools import product
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
from benchmarks.common import RESULTS, Json, complete, parser, time_speed_up
from jacobiflow.models.memory import keep_freed_memory

TRANSFORMS, CONTEXT = 5, 4
HIDDEN, ROWS = 50, (1, 100, 10_000)
WIDE, WIDE_HIDDEN, WIDE_ROWS = 784, 512, (1, 64)
MILLION = {("MAF", "fast"): 20, ("NSF", "fast"): 5, ("MAF", "slow"): 5}  # features of 10^6 rows
ERROR_ROWS, ERROR_FEATURES = 100, 64  # the largest sizes of which errors are measured
LEAST, MOST, SECONDS = 3, 30, 1.0  # rounds, and the seconds that the library's own rounds may take

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
FEATURES = {
    "MAF": (2, 5, 10, 20, 64), "NSF": (2, 5, 10, 20), "linear spline": (2, 5, 10), "MAF(passes=2)": (5, 16),
    "NSF(passes=2)": (5, 16), "NICE": (5, 16), "SOSPF": (5, 16), "BPF": (5, 16), "NAF": (5, 16), "UNAF": (5, 8),
}  # fmt: skip
BISECTED = {"SOSPF", "BPF", "NAF", "UNAF"}  # Flows that are inverted by bisection. More rows take minutes.
MAX_BISECTED_ROWS = 100
SLOW_DENSITY = {("normflows", "MAF"), ("pyro", "MAF"), ("pyro", "NSF"), ("pyro", "linear spline")}
PACKAGES = {"zuko": "zuko", "nflows": "nflows", "normflows": "normflows", "pyro": "pyro-ppl"}


def calls(flow: Any, context: Tensor, rows: int) -> dict[str, Call]:
    """A flow's sampling from latents, its density, and latents if they are the fast direction, at one context."""
    if isinstance(flow, zuko.flows.Flow):
        return {
            "sampling": lambda z: flow(context).transform.inv(z),
            "density": lambda x: flow(context).log_prob(x),
            "latents": lambda x: flow(context).transform(x),
        }
    repeated = context.repeat(rows, 1)
    if isinstance(flow, nflows.flows.Flow):
        return {
            "sampling": lambda z: flow._transform.inverse(z, repeated)[0],
            "density": partial(flow.log_prob, context=repeated),
            "latents": partial(flow.transform_to_noise, context=repeated),
        }
    if isinstance(flow, normflows.NormalizingFlow):
        methods = {"sampling": flow.forward, "density": flow.log_prob, "latents": flow.inverse}
        return {name: partial(method, context=repeated) for name, method in methods.items()}
    zeros = context.new_zeros(flow[0].nn.input_dim)
    base = pyro.Normal(zeros, zeros + 1).to_event(1)
    conditioned = pyro.ConditionalTransformedDistribution(base, list(flow)).condition(context)

    def sampling(z: Tensor) -> Tensor:
        for transform in conditioned.transforms:
            z = transform(z[:])
        return z

    # pyro returns what it has for the tensor that it saw last; a view is another tensor
    return {"sampling": sampling, "density": lambda x: conditioned.log_prob(x[:])}


def measure(key: Json) -> Json:
    """Seconds of one direction, by the library and accelerated, and the root mean square errors of few rows."""
    library, kind, features, rows = (key[name] for name in ("library", "flow", "features", "rows"))
    slow, fast = ("density", "sampling") if (library, kind) in SLOW_DENSITY else ("sampling", "density")
    call = slow if key["direction"] == "slow" else fast
    torch.manual_seed(0)
    flow = FLOWS[library, kind](features, key["hidden"], CONTEXT).requires_grad_(False).eval()
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
        metrics, results = time_speed_up(runs, LEAST if rows > ROWS[-1] else rounds(runs["library"]))
        if rows <= ERROR_ROWS and features <= ERROR_FEATURES:
            exact = calls(copy.deepcopy(flow).double(), context.double(), rows)[call](inputs.double())
            metrics["error"] = {name: float((each - exact).square().mean().sqrt()) for name, each in results.items()}
    return {"call": call, **metrics, "backends": sorted(set(handle.backends.values()))}


def rounds(run: Callable[[], Any]) -> int:
    """As many rounds as `SECONDS` allow, within limits."""
    started = perf_counter()
    run()
    return min(MOST, max(LEAST, int(SECONDS / (perf_counter() - started))))


def keys() -> Iterator[Json]:
    """All sizes that are measured; those that take longest come last."""

    def key_of(library: str, kind: str, features: int, *others: Any) -> Json:
        names = ("library", "version", "flow", "features", "hidden", "rows", "direction")
        return dict(zip(names, (library, version(PACKAGES[library]), kind, features, *others), strict=True))

    directions = ("slow", "fast")
    for library, kind in FLOWS:
        for features, rows, direction in product(FEATURES[kind], ROWS, directions):
            if direction == "fast" or kind not in BISECTED or rows <= MAX_BISECTED_ROWS:
                yield key_of(library, kind, features, HIDDEN, rows, direction)
    for library, rows, direction in product(("zuko", "nflows"), WIDE_ROWS, directions):
        yield key_of(library, "MAF", WIDE, WIDE_HIDDEN, rows, direction)
    for (kind, direction), most in MILLION.items():
        for features in FEATURES[kind]:
            if features <= most:
                yield key_of("zuko", kind, features, HIDDEN, 1_000_000, direction)


def main() -> None:
    parser(__doc__).parse_args()
    complete(RESULTS / "masked-flows.json", keys(), measure)


if __name__ == "__main__":
    keep_freed_memory()
    main()
