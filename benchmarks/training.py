"""Times training of masked flows, by the libraries as they are and accelerated: `python -m benchmarks.training`.

Writes docs/results/training.json, which fills docs/training.md and docs/libraries.md, in a quarter of an hour on two
idle cores. Flows have five transforms, random weights and a context of ten features for each row; that of nflows is
sbi's "maf". A step is zero_grad, the loss, its gradients, clipping and Adam. The learning rate is so small that all
steps do the same work.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from itertools import product
from time import perf_counter
from typing import Any

import pyro.distributions as pyro
import torch
import zuko
from sbi.neural_nets.net_builders import build_maf
from torch import Tensor, nn

import jacobiflow as jf
from benchmarks.common import RESULTS, Json, complete, parser, time_speed_up
from benchmarks.masked_flows import FLOWS, PACKAGES
from benchmarks.profiling import CLIPPING, NATIVE, OPTIMIZER, Profile
from benchmarks.sbi_flows import PRIOR, simulate
from jacobiflow.models.memory import keep_freed_memory
from jacobiflow.utils.timing import time_call

TRANSFORMS, CONTEXT, CLIP = 5, 10, 5.0
SMALL, LARGE = "50 x 2", "256 x 3"  # hidden features
RATE = 1e-6  # The learning rate of steps whose time is measured.
STEP, GRADIENTS, IN_X, IN_CONTEXT, SAMPLES, LOSSES = (
    "training step", "forward and backward", "gradient in x", "gradient in the context", "rsample and backward",
    "loss after 1,000 steps",
)  # fmt: skip
ADAM, FUSED, NO_OPTIMIZER = "Adam", "Adam(fused=True)", "none"
ERROR_ROWS = 1_000  # the largest number of rows whose gradients are compared with those in float64
CALLS, BLOCK = 10, 0.2  # calls that are timed together: at most, and the seconds that the library's may take
LEAST, MOST, SECONDS = 4, 200, 2.0  # rounds of these, and the seconds that all of the library's may take
PROFILED = (10, 100)  # calls of a profile, at least and at most
SIMULATIONS, STEPS, RATE_OF_LOSSES, NUDGE = 10_000, 1_000, 5e-4, 1e-7


def build(key: Json, context: int = CONTEXT) -> nn.Module:
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


def log_prob(flow: Any, x: Tensor, context: Tensor) -> Tensor:
    if isinstance(flow, zuko.flows.Flow):
        return flow(context).log_prob(x)
    if isinstance(flow, nn.ModuleList):  # These are transforms of pyro.
        zeros = x.new_zeros(x.shape[1])
        base = pyro.Normal(zeros, zeros + 1).to_event(1)
        return pyro.ConditionalTransformedDistribution(base, list(flow)).condition(context).log_prob(x)
    return flow.log_prob(x, context)


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

    def __call__(self) -> None:
        if self.optimizer is None:
            for leaf in self.leaves:
                leaf.grad = None
            (self.flow(self.context).rsample().square().mean() if self.draws else self.loss()).backward()
        else:
            self.optimizer.zero_grad()
            self.loss().backward()
            nn.utils.clip_grad_norm_(self.flow.parameters(), CLIP)
            self.optimizer.step()

    def loss(self) -> Tensor:
        """The loss; of samples from latents x, which are the same in float64."""
        if self.draws:
            return self.flow(self.context).transform.inv(self.x).square().mean()
        return -log_prob(self.flow, self.x, self.context).mean()

    def gradient(self) -> Tensor:
        """The gradient in all leaves, as one vector in float64."""
        parts = torch.autograd.grad(self.loss(), self.leaves)
        return torch.cat([part.flatten().double() for part in parts])


def repeat(call: Callable[[], Any], calls: int, threads: int) -> None:
    torch.set_num_threads(threads)
    for _ in range(calls):
        call()


def profile(call: Callable[[], None], seconds: float) -> Json:
    """Median milliseconds of a call: in the optimizer, in clipping, in native code, and the rest."""
    watch, count = Profile(perf_counter), min(PROFILED[1], max(PROFILED[0], int(SECONDS / seconds)))
    with watch.watching():
        for i in range(count):
            with watch.phase(str(i)):
                call()
    calls = list(watch.seconds.values())
    parts = {part: 1e3 * statistics.median(each[part] for each in calls) for part in (OPTIMIZER, CLIPPING, NATIVE)}
    total = 1e3 * statistics.median(sum(each.values()) for each in calls)
    return parts | {"rest": total - sum(parts.values())}


def measure(key: Json) -> Json:
    """Seconds of a call by the library and accelerated, the parts of the latter, and the errors of gradients."""
    if key["task"] == LOSSES:
        return losses(key)
    flow = build(key)
    accelerated, precise = copy.deepcopy(flow), copy.deepcopy(flow).double()
    fast = jf.accelerate(accelerated)
    torch.manual_seed(1)
    inputs = torch.randn(key["rows"], key["features"]), torch.randn(key["rows"], CONTEXT)
    few = [each[:ERROR_ROWS] for each in inputs]
    exact = Task(key, precise, few[0].double(), few[1].double()).gradient()
    flows = {"library": flow, "accelerated": accelerated}
    errors = {name: Task(key, each, *few).gradient() - exact for name, each in flows.items()}
    tasks = {name: Task(key, each, *inputs) for name, each in flows.items()}
    tasks["library"]()
    seconds, _ = time_call(tasks["library"], torch.device("cpu"))
    calls = min(CALLS, max(1, int(BLOCK / seconds)))
    rounds = min(MOST, max(LEAST, int(SECONDS / (calls * seconds))))
    runs = {name: partial(repeat, task, calls, key["threads"]) for name, task in tasks.items()}
    if key["threads"] > 1:
        runs["accelerated, one thread"] = partial(repeat, tasks["accelerated"], calls, 1)
    metrics, _ = time_speed_up(runs, rounds)
    for timing in metrics["seconds"].values():
        timing |= {name: value / calls for name, value in timing.items()}
    torch.set_num_threads(key["threads"])
    metrics["profile"] = profile(tasks["accelerated"], metrics["seconds"]["accelerated"]["median"])
    torch.set_num_threads(1)
    metrics["error"] = {name: float(error.abs().max() / exact.abs().max()) for name, error in errors.items()}
    return {"calls": calls, **metrics, "backends": sorted(set(fast.backends.values()))}


def losses(key: Json) -> Json:
    """Losses of all simulations after training from one seed, and by the library from weights that hardly differ."""
    torch.manual_seed(0)
    theta = PRIOR.sample((SIMULATIONS,))
    x, context = ((each - each.mean(0)) / each.std(0) for each in (theta, simulate(theta)))
    ends = {}
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
            optimizer.zero_grad()
            (-log_prob(flow, x[rows], context[rows]).mean()).backward()
            nn.utils.clip_grad_norm_(flow.parameters(), CLIP)
            optimizer.step()
        if fast is not None:
            fast.restore()
        with torch.no_grad():
            ends[name] = float(-log_prob(flow, x, context).mean())
    return {"losses": ends}


def keys() -> Iterator[Json]:
    """All tasks; those that take longest come last."""

    def key_of(task: str, flow: tuple[str, str], features: int, rows: int, **others: Any) -> Json:
        names = {"task": task, "library": flow[0], "version": version(PACKAGES[flow[0]]), "flow": flow[1]}
        sizes = {"features": features, "hidden": SMALL, "rows": rows, "optimizer": NO_OPTIMIZER, "threads": 1}
        return names | sizes | others

    zukos, maf = [("zuko", "MAF"), ("zuko", "NSF")], ("nflows", "MAF")
    for flow, rows, features, optimizer in product(zukos, (200, 1_000), (5, 20), (ADAM, FUSED)):
        yield key_of(STEP, flow, features, rows, optimizer=optimizer)
    for flow, optimizer in product([maf, ("normflows", "MAF"), ("pyro", "MAF")], (ADAM, FUSED)):
        yield key_of(STEP, flow, 5, 200, optimizer=optimizer)
    for flow, features in product(zukos, (5, 20)):
        yield key_of(STEP, flow, features, 200, optimizer=ADAM, hidden=LARGE)
        yield key_of(SAMPLES, flow, features, 1_000)
        yield key_of(GRADIENTS, flow, features, 1_000)
    for flow in (*zukos, maf):
        yield key_of(LOSSES, flow, 5, 200, optimizer=ADAM)
        for task, rows in product((IN_X, IN_CONTEXT), (1, 20)):
            yield key_of(task, flow, 5, rows)
        for rows, threads in product((200, 10_000), (1, 2)):
            yield key_of(GRADIENTS, flow, 5, rows, threads=threads)
    for flow, features in product(zukos, (5, 20)):
        if features == 20:
            yield key_of(GRADIENTS, flow, features, 10_000)
        for optimizer in (ADAM, FUSED):
            yield key_of(STEP, flow, features, 10_000, optimizer=optimizer)


def main() -> None:
    parser(__doc__).parse_args()
    torch.set_num_threads(1)
    complete(RESULTS / "training.json", keys(), measure)


if __name__ == "__main__":
    keep_freed_memory()
    main()
