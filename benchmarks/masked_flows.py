"""Times masked flows of four libraries, as they are and accelerated: `python -m benchmarks.masked_flows [FILE ...]`.

Each FILE is a result file, measured on two idle cores. Flows have five transforms and random weights.
- `masked-flows` (half an hour; docs/flows.md): sampling, without its random numbers, and the
  density, at one context of four features for all rows. The slow direction makes a pass of the network for each
  feature: sampling, or the density in some flows of normflows and pyro.
- `training` (a quarter of an hour; docs/training.md): training steps and gradients, with a
  context of ten features for each row; nflows' flow is sbi's "maf". The learning rate is so small that all steps do
  the same work.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from itertools import product
from typing import Any

import torch
import zuko
from sbi.neural_nets.net_builders import build_maf
from torch import Tensor, nn

import jacobiflow as jf
from benchmarks.lib.library_flows import FLOWS, PACKAGES, TRANSFORMS, calls, log_prob, training_step
from benchmarks.lib.process import threads
from benchmarks.lib.results import Json, measure_files
from benchmarks.lib.simulator import standardized
from benchmarks.lib.timing import seconds_of, time_speed_up

CONTEXT = 4
HIDDEN, ROWS = 50, (1, 100, 10_000)
WIDE, WIDE_HIDDEN, WIDE_ROWS = 784, 512, (1, 64)
MILLION = {("MAF", "fast"): 20, ("NSF", "fast"): 5, ("MAF", "slow"): 5}  # features of 10^6 rows
ERROR_ROWS, ERROR_FEATURES = 100, 64  # the largest sizes of which errors are measured
MIN_ROUNDS, MAX_ROUNDS, SECONDS = 3, 1000, 1.0  # rounds, and the seconds that all of the library's may take
FEATURES = {
    "MAF": (2, 5, 10, 20, 64), "NSF": (2, 5, 10, 20), "linear spline": (2, 5, 10), "MAF(passes=2)": (5, 16),
    "NSF(passes=2)": (5, 16), "NICE": (5, 16), "SOSPF": (5, 16), "BPF": (5, 16), "NAF": (5, 16), "UNAF": (5, 8),
}  # fmt: skip
BISECTED = {"SOSPF", "BPF", "NAF", "UNAF"}  # Flows that are inverted by bisection. More rows take minutes.
MAX_BISECTED_ROWS = 100
SLOW_DENSITY = {("normflows", "MAF"), ("pyro", "MAF"), ("pyro", "NSF"), ("pyro", "linear spline")}

ROW_CONTEXT = 10
ZUKO, NFLOWS = [("zuko", "MAF"), ("zuko", "NSF")], ("nflows", "MAF")  # whose training is measured
SMALL, LARGE = "50 x 2", "256 x 3"  # hidden features
RATE = 1e-6  # The learning rate of steps whose time is measured.
STEP, GRADIENTS, IN_X, IN_CONTEXT, SAMPLES, LOSSES = (
    "training step", "forward and backward", "gradient in x", "gradient in the context", "rsample and backward",
    "loss after 1,000 steps",
)  # fmt: skip
ADAM, FUSED, NO_OPTIMIZER = "Adam", "Adam(fused=True)", "none"
GRADIENT_ROWS = 1_000  # the largest number of rows whose gradients are compared with those in float64
SIMULATIONS, STEPS, RATE_OF_LOSSES, NUDGE = 10_000, 1_000, 5e-4, 1e-7


def count_rounds(run: Callable[[], Any]) -> int:
    """The number of runs that take about `SECONDS` together."""
    return min(MAX_ROUNDS, max(MIN_ROUNDS, int(SECONDS / seconds_of(run))))


def measure_call(key: Json) -> Json:
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
        metrics, results = time_speed_up(runs, count_rounds(runs["library"]))
        if rows <= ERROR_ROWS and features <= ERROR_FEATURES:
            exact = calls(copy.deepcopy(flow).double(), context.double(), rows)[call](inputs.double())
            metrics["error"] = {name: float((each - exact).square().mean().sqrt()) for name, each in results.items()}
    return {"call": call, **metrics, "backends": sorted(set(handle.backends.values()))}


def call_keys() -> Iterator[Json]:
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


def build(key: Json, context: int = ROW_CONTEXT) -> nn.Module:
    """A flow with random weights, the same each time."""
    width, layers = map(int, key["hidden"].split(" x "))
    torch.manual_seed(0)
    if key["library"] == "zuko":
        kind = getattr(zuko.flows, key["flow"])
        return kind(key["features"], context, transforms=TRANSFORMS, hidden_features=[width] * layers)
    if key["library"] == "nflows":  # It has tanh, and shuffles features between transforms.
        rows = torch.zeros(2, key["features"]), torch.zeros(2, context)
        return build_maf(*rows, "none", "none", width, TRANSFORMS, num_blocks=layers).net
    return FLOWS[key["library"], key["flow"]](key["features"], width, context)


class Task:
    """A call of one of the tasks on a flow, with or without a step of an optimizer."""

    def __init__(self, key: Json, flow: nn.Module, x: Tensor, context: Tensor) -> None:
        self.flow, self.x, self.context, self.draws = flow, x.clone(), context.clone(), key["task"] == SAMPLES
        self.leaves: list[Tensor] = list(flow.parameters())
        if key["task"] in (IN_X, IN_CONTEXT):
            flow.requires_grad_(False)
            self.leaves = [(self.x if key["task"] == IN_X else self.context).requires_grad_()]
        is_fused = key["optimizer"] == FUSED
        self.optimizer = torch.optim.Adam(self.leaves, RATE, fused=is_fused) if key["task"] == STEP else None

    def run(self) -> None:
        if self.optimizer is None:
            for leaf in self.leaves:
                leaf.grad = None
            (self.flow(self.context).rsample().square().mean() if self.draws else self.loss()).backward()
        else:
            training_step(self.flow, self.optimizer, self.x, self.context)

    def loss(self) -> Tensor:
        """The loss; of samples from latents x, which are the same in float64."""
        if self.draws:
            return self.flow(self.context).transform.inv(self.x).square().mean()
        return -log_prob(self.flow, self.x, self.context).mean()

    def gradient(self) -> Tensor:
        """The gradient in all leaves, as one vector in float64."""
        parts = torch.autograd.grad(self.loss(), self.leaves)
        return torch.cat([part.flatten().double() for part in parts])


def measure_training(key: Json) -> Json:
    """Seconds of a call by the library and accelerated, and the errors of gradients."""
    flow = build(key)
    accelerated, precise = copy.deepcopy(flow), copy.deepcopy(flow).double()
    jf.accelerate(accelerated)
    torch.manual_seed(1)
    inputs = torch.randn(key["rows"], key["features"]), torch.randn(key["rows"], ROW_CONTEXT)
    few = [each[:GRADIENT_ROWS] for each in inputs]
    exact = Task(key, precise, few[0].double(), few[1].double()).gradient()
    flows = {"library": flow, "accelerated": accelerated}
    errors = {name: Task(key, each, *few).gradient() - exact for name, each in flows.items()}
    tasks = {name: Task(key, each, *inputs).run for name, each in flows.items()}
    tasks["library"]()
    rounds = count_rounds(tasks["library"])
    use_threads = threads(key["threads"])
    runs = {name: use_threads(task) for name, task in tasks.items()}
    if key["threads"] > 1:
        runs["accelerated, one thread"] = tasks["accelerated"]
    metrics, _ = time_speed_up(runs, rounds)
    metrics["error"] = {name: float(error.abs().max() / exact.abs().max()) for name, error in errors.items()}
    return metrics


def measure_losses(key: Json) -> Json:
    """Losses of all simulations after training from one seed, and by the library from weights that hardly differ."""
    (x, context), ends = standardized(SIMULATIONS), {}
    for name in ("library", "accelerated", "library, first weights changed by 1e-7"):
        flow = build(key, context.shape[1])
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.mul_(1 + NUDGE * torch.randn_like(parameter) * ("changed" in name))
        fast = jf.accelerate(flow) if name == "accelerated" else None
        optimizer = torch.optim.Adam(flow.parameters(), RATE_OF_LOSSES)
        torch.manual_seed(1)
        for _ in range(STEPS):
            rows = torch.randint(SIMULATIONS, (key["rows"],))
            training_step(flow, optimizer, x[rows], context[rows])
        if fast is not None:
            fast.restore()
        with torch.no_grad():
            ends[name] = float(-log_prob(flow, x, context).mean())
    return {"losses": ends}


def training_key(task: str, flow: tuple[str, str], features: int, rows: int, **others: Any) -> Json:
    names = {"task": task, "library": flow[0], "version": version(PACKAGES[flow[0]]), "flow": flow[1]}
    sizes = {"features": features, "hidden": SMALL, "rows": rows, "optimizer": NO_OPTIMIZER, "threads": 1}
    return names | sizes | others


def training_keys() -> Iterator[Json]:
    for flow, features, rows, optimizer in product(ZUKO, (5, 20), (200, 1_000, 10_000), (ADAM, FUSED)):
        yield training_key(STEP, flow, features, rows, optimizer=optimizer)
    for flow, optimizer in product([NFLOWS, ("normflows", "MAF"), ("pyro", "MAF")], (ADAM, FUSED)):
        yield training_key(STEP, flow, 5, 200, optimizer=optimizer)
    for flow, features in product(ZUKO, (5, 20)):
        yield training_key(STEP, flow, features, 200, optimizer=ADAM, hidden=LARGE)
        yield training_key(SAMPLES, flow, features, 1_000)
        yield training_key(GRADIENTS, flow, features, 1_000)
    for flow in ZUKO:
        yield training_key(GRADIENTS, flow, 20, 10_000)
    for flow in (*ZUKO, NFLOWS):
        for task, rows in product((IN_X, IN_CONTEXT), (1, 20)):
            yield training_key(task, flow, 5, rows)
        for rows, count in product((200, 10_000), (1, 2)):
            yield training_key(GRADIENTS, flow, 5, rows, threads=count)


def main() -> None:
    losses = (training_key(LOSSES, flow, 5, 200, optimizer=ADAM) for flow in (*ZUKO, NFLOWS))
    measure_files(__doc__, {
        "masked-flows": [(call_keys(), measure_call)],
        "training": [(training_keys(), measure_training), (losses, measure_losses)],
    }, one_thread=["training"])  # fmt: skip


if __name__ == "__main__":
    main()
