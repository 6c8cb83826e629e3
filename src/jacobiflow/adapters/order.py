"""The order in which the masks of a network let its units and features be computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from jacobiflow.adapters.masked import Linear, MaskedNetwork, Sum


@dataclass(frozen=True)
class Order:
    """The steps of a masked network: the parameters of a step's features depend on features of earlier steps only.

    Attributes:
        features: All features, sorted by step.
        starts: For each step, where its features start in `features`, and D at the end.
        units: For each value of the network, its units, sorted by the first step that can compute them. Value 0 is the
            input. Those of the last value are the parameters, feature by feature.
        known: For each value, how many of its units are known once the features before each step are.
    """

    features: list[int]
    starts: list[int]
    units: list[list[int]]
    known: list[list[int]]


@torch.no_grad()
def find_order(network: MaskedNetwork) -> Order | None:
    """The order in which units and features can be computed; `None` if the network is not autoregressive."""
    step_of = _steps(_dependencies(network)[network.outputs].any(dim=1))
    ready = None if step_of is None else _first_steps(network, step_of)
    if step_of is None or ready is None:
        return None
    steps, features = int(step_of.max()) + 1, step_of.argsort(stable=True)
    parameters = network.outputs[features].flatten()
    units = [parameters if ready_at is ready[-1] else ready_at.argsort(stable=True) for ready_at in ready]
    known = [[int((ready_at <= step).sum()) for step in range(steps)] for ready_at in ready]
    starts = [int((step_of < step).sum()) for step in range(steps + 1)]
    return Order(features.tolist(), starts, [ready_at.tolist() for ready_at in units], known)


def _dependencies(network: MaskedNetwork) -> Bool[Tensor, "units d"]:
    """The features that each unit of the last value depends on, by any path through the masks."""
    features = len(network.outputs)
    value = torch.zeros(network.width, features, dtype=torch.float32, device="cpu")
    value[network.features] = torch.eye(features, dtype=value.dtype, device="cpu")
    values = [value]
    for operation in network.operations:
        value = values[operation.source]
        if isinstance(operation, Linear):
            value = ((operation.layer.mask != 0).to(value) @ value > 0).to(value)
        elif isinstance(operation, Sum):
            value = torch.maximum(value, values[operation.other])
        values.append(value)
    return values[-1].bool()


def _steps(needs: Bool[Tensor, "d d"]) -> Int[Tensor, " d"] | None:
    """The step at which each feature can be solved; `None` if features depend on each other in a circle."""
    step_of = torch.full((len(needs),), -1, device="cpu")
    missing, step = needs.sum(dim=1), 0
    while (step_of < 0).any():
        ready = (missing == 0) & (step_of < 0)
        if not ready.any():
            return None
        step_of[ready] = step
        missing = missing - needs[:, ready].sum(dim=1)
        step += 1
    return step_of


def _first_steps(network: MaskedNetwork, step_of: Int[Tensor, " d"]) -> list[Int[Tensor, " units"]] | None:
    """The first step before which each unit of each value can be computed; `None` if that is too late for a parameter.

    Values that elementwise operations connect share one tensor, as a unit of one of them is a unit of all. A residual
    block may so delay its own input: the steps are the least that satisfy all operations.
    """
    of_input = torch.zeros(network.width, dtype=torch.long, device="cpu")
    of_input[network.features] = step_of + 1
    of_output = torch.empty(network.outputs.numel(), dtype=torch.long, device="cpu")
    of_output[network.outputs] = step_of[:, None]
    ready = [of_input]
    for operation in network.operations:
        if isinstance(operation, Linear):
            ready.append(torch.zeros(len(operation.layer.mask), dtype=torch.long, device="cpu"))
        else:
            ready.append(ready[operation.source])
        if isinstance(operation, Sum):
            ready = [ready[-1] if steps is ready[operation.other] else steps for steps in ready]
    last = ready[-1]
    last.copy_(of_output)
    while True:
        before = [steps.clone() for steps in ready]
        for value, operation in enumerate(network.operations, start=1):
            if isinstance(operation, Linear):
                reads = ((operation.layer.mask != 0).cpu() * ready[operation.source]).amax(dim=1)
                if ready[value] is not last:
                    torch.maximum(ready[value], reads, out=ready[value])
                elif (reads > last).any():
                    return None
        if all(torch.equal(old, new) for old, new in zip(before, ready, strict=True)):
            return ready
