"""The order in which the masks of a network let its units and features be computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from jacobiflow.adapters.network import MaskedNetwork, UnsupportedError
from jacobiflow.native.structures import Kind


@dataclass(frozen=True)
class Order:
    """The steps of a masked network: the parameters of a step's features depend on features of earlier steps only.

    Attributes:
        features: All features, sorted by step.
        starts: The positions in `features` at which each step starts, and D at the end.
        units: The units of each value of the network, sorted by the first step that can compute them. Value 0 is the
            input; units of the last value are the parameters, feature by feature.
        ready: The number of units of each value that can be computed at each step.
    """

    features: list[int]
    starts: list[int]
    units: list[list[int]]
    ready: list[list[int]]


@torch.no_grad()
def find_order(network: MaskedNetwork) -> Order:
    """Returns the order in which units and features can be computed.

    Raises:
        UnsupportedError: If the network is not autoregressive.
    """
    step_of = _steps(_dependencies(network)[network.outputs].any(dim=1))
    first_steps = _first_steps(network, step_of)
    steps, features = range(int(step_of.max()) + 1), step_of.argsort(stable=True)
    units = [first.argsort(stable=True).tolist() for first in first_steps[:-1]]
    units.append(network.outputs[features].flatten().tolist())
    ready = [[int((first <= step).sum()) for step in steps] for first in first_steps]
    starts = [int((step_of < step).sum()) for step in (*steps, len(steps))]
    return Order(features.tolist(), starts, units, ready)


def _dependencies(network: MaskedNetwork) -> Bool[Tensor, "units d"]:
    """The features that each unit of the last value depends on, by any path through the masks."""
    features = len(network.outputs)
    value = torch.zeros(network.width, features, dtype=torch.float32, device="cpu")
    value[network.features] = torch.eye(features, dtype=value.dtype, device="cpu")
    values = [value]
    for operation, layer in zip(network.operations, network.layers, strict=True):
        value = values[operation.source]
        if operation.kind == Kind.LINEAR:
            value = ((layer.mask != 0).to(value) @ value > 0).to(value)
        elif operation.kind == Kind.SUM:
            value = torch.maximum(value, values[operation.other])
        values.append(value)
    return values[-1].bool()


def _steps(dependencies: Bool[Tensor, "d d"]) -> Int[Tensor, " d"]:
    """The step at which each feature can be solved."""
    step_of = torch.full((len(dependencies),), -1, device="cpu")
    missing, step = dependencies.sum(dim=1), 0
    while (step_of < 0).any():
        is_solvable = (missing == 0) & (step_of < 0)
        if not is_solvable.any():
            raise UnsupportedError("a network that is not autoregressive")
        step_of[is_solvable] = step
        missing = missing - dependencies[:, is_solvable].sum(dim=1)
        step += 1
    return step_of


def _first_steps(network: MaskedNetwork, step_of: Int[Tensor, " d"]) -> list[Int[Tensor, " units"]]:
    """The first step at which each unit of each value can be computed.

    Values that elementwise operations connect share one tensor, as a unit of one of them is a unit of all. A residual
    block may so delay its own input: the steps are the least that satisfy all operations.
    """
    of_input = torch.zeros(network.width, dtype=torch.long, device="cpu")
    of_input[network.features] = step_of + 1
    of_output = torch.empty(network.outputs.numel(), dtype=torch.long, device="cpu")
    of_output[network.outputs] = step_of[:, None]
    first_steps = [of_input]
    for operation, layer in zip(network.operations, network.layers, strict=True):
        if operation.kind == Kind.LINEAR:
            first_steps.append(torch.zeros(len(layer.mask), dtype=torch.long, device="cpu"))
        else:
            first_steps.append(first_steps[operation.source])
        if operation.kind == Kind.SUM:
            other = first_steps[operation.other]
            first_steps = [first_steps[-1] if steps is other else steps for steps in first_steps]
    last = first_steps[-1]
    last.copy_(of_output)
    while True:
        before = [steps.clone() for steps in first_steps]
        for value, (operation, layer) in enumerate(zip(network.operations, network.layers, strict=True), start=1):
            if operation.kind == Kind.LINEAR:
                least = ((layer.mask != 0).cpu() * first_steps[operation.source]).amax(dim=1)
                if first_steps[value] is not last:
                    torch.maximum(first_steps[value], least, out=first_steps[value])
                elif (least > last).any():  # a residual block delays its input beyond the parameter that needs it
                    raise UnsupportedError("a network that is not autoregressive")
        if all(torch.equal(old, new) for old, new in zip(before, first_steps, strict=True)):
            return first_steps
