"""Measures an NVIDIA GPU for docs/devices.md: `python -m benchmarks.gpu`, then `make render`. It was never run on one.

It takes PyTorch for CUDA, and in a clone `pip install -e '.[zuko,cuda]'` and a C++ compiler. If stopped, it goes on.

- Flows of zuko by the kernel of `jf.accelerate(flow, cuda=True)`, by zuko itself, by zuko in a CUDA graph and by
  torch.compile, with their errors against zuko in float64, and what the model of costs says.
- Bundled models by the original sampler, the exact loop, sweeps and `auto`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
import zuko
from torch import Tensor, nn

import jacobiflow as jf
from benchmarks.lib.models import latents, sample
from benchmarks.lib.results import Json, measure_files
from jacobiflow.comparison.baselines import original_sampler
from jacobiflow.native import cuda
from jacobiflow.utils.timing import describe_machine, time_interleaved

DEVICE = "cuda"
CONTEXT, TRANSFORMS = 4, 5
FEATURES, HIDDEN, ROWS = {"MAF": (5, 20, 64), "NSF": (5, 20)}, (50, 256), (1, 1_000, 100_000)
COMPILED = {"hidden": 50, "rows": 1_000}  # sizes that torch.compile compiles, which takes it long
COMPILED_FEATURES = 5  # the most with which it compiles an inverse, a network for each feature
ERROR_ROWS = 1_000  # the first rows, of which errors are measured
ROUNDS = 20
MODELS, BATCHES = ("digits-p1", "fashion-p2"), (1, 16, 64)
MODEL_ROUNDS = 3
STRATEGIES = ("sequential", "jacobi", "window:32")

Call = Callable[[Tensor], Tensor]


def in_graph(call: Call, x: Tensor) -> Callable[[], Tensor]:
    """Captures a call as one CUDA graph."""
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            call(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(x)

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def compiled(call: Call, x: Tensor) -> Callable[[], Tensor]:
    return partial(torch.compile(call), x)


# Ways to call zuko's own code.
WAYS: dict[str, Callable[[Call, Tensor], Callable[[], Tensor]]] = {
    "zuko": partial, "CUDA graph": in_graph, "torch.compile": compiled,
}  # fmt: skip


def call_of(flow: nn.Module, direction: str, context: Tensor) -> Call:
    """Returns the inverse or the log-density of a flow of zuko."""
    return lambda x: flow(context).transform.inv(x) if direction == "sampling" else flow(context).log_prob(x)


@torch.no_grad()
def measure_flow(key: Json) -> Json:
    """Milliseconds of one direction in each way, errors, and the model of costs. The kernel runs whatever it says."""
    direction, rows = key["direction"], key["rows"]
    torch.manual_seed(0)
    kind, hidden = getattr(zuko.flows, key["flow"]), (key["hidden"],) * 2
    flow = kind(key["features"], CONTEXT, transforms=TRANSFORMS, hidden_features=hidden).eval().to(DEVICE)
    context, x = torch.randn(CONTEXT, device=DEVICE), torch.randn(rows, key["features"], device=DEVICE)
    accelerated = copy.deepcopy(flow)
    handle = jf.accelerate(accelerated, cuda=True)
    runs: dict[str, Callable[[], Tensor]] = {"kernel": partial(call_of(accelerated, direction, context), x)}
    failures: dict[str, str] = {}
    is_compiled = COMPILED.items() <= key.items() and (direction == "density" or key["features"] <= COMPILED_FEATURES)
    for name in WAYS if is_compiled else WAYS.keys() - {"torch.compile"}:
        try:
            run = WAYS[name](call_of(flow, direction, context), x)
            run()
            runs[name] = run
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    with patch.object(cuda, "estimate_seconds", lambda *_: (1.0, 0.0)):
        timings, results = time_interleaved(runs, ROUNDS, DEVICE)
    exact = call_of(copy.deepcopy(flow).double(), direction, context.double())(x[:ERROR_ROWS].double())
    errors = {name: float((out[:ERROR_ROWS] - exact).square().mean().sqrt()) for name, out in results.items()}
    chain = handle.parts[accelerated.transform].find_native(is_conditional=True).chain
    processors = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    model = cuda.estimate_seconds(chain, direction == "sampling", rows, processors)
    return {
        "milliseconds": {name: 1e3 * timing.median for name, timing in timings.items()}, "error": errors,
        "failures": failures, "backends": sorted(set(handle.backends.values())), "refusals": sorted(handle.refusals),
        "model": {name: 1e3 * seconds for name, seconds in zip(("zuko", "kernel"), model, strict=True)},
    }  # fmt: skip


def flow_keys() -> Iterator[Json]:
    for kind, sizes in FEATURES.items():
        for features, hidden, rows, direction in product(sizes, HIDDEN, ROWS, ("sampling", "density")):
            names = ("device", "flow", "features", "hidden", "rows", "direction")
            values = (describe_machine(DEVICE)["device"], kind, features, hidden, rows, direction)
            yield dict(zip(names, values, strict=True))


@torch.no_grad()
def measure_model(key: Json) -> Json:
    """Milliseconds of a batch in each way, and the largest difference from the exact loop."""
    flow, batch = jf.load(key["model"], device=DEVICE), key["batch"]
    z, context = latents(flow, batch)
    states = flow.context_kind.resolve(context, batch).values
    original = partial(original_sampler(flow)[1], flow, z.to(DEVICE), None if states is None else states.to(DEVICE))
    strategies: dict[str, Any] = {name: name for name in STRATEGIES}
    strategies["auto"] = jf.plan(flow, batch_size=batch)
    runs: dict[str, Callable[[], Any]] = {"original": original}
    runs |= {name: partial(sample, flow, each, z, context) for name, each in strategies.items()}
    timings, results = time_interleaved(runs, MODEL_ROUNDS, DEVICE)
    errors = {name: float((results[name].x - results["sequential"].x).abs().max()) for name in strategies}
    return {"milliseconds": {name: 1e3 * timing.median for name, timing in timings.items()}, "error": errors}


def model_keys() -> Iterator[Json]:
    for model, batch in product(MODELS, BATCHES):
        yield {"device": describe_machine(DEVICE)["device"], "model": model, "batch": batch}


def main() -> None:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu measures an NVIDIA GPU, and PyTorch finds none here")
    measure_files(__doc__, {"gpu": [(flow_keys(), measure_flow), (model_keys(), measure_model)]})


if __name__ == "__main__":
    main()
