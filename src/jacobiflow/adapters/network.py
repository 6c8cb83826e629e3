"""Masked networks as lists of operations, and the order in which native code computes their units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn import functional as F

from jacobiflow.errors import UnsupportedError
from jacobiflow.native.boundary import Activation, Operation, OperationKind

Slot = tuple[dict[str, Any], str]
"""A place of a tensor: a dictionary of a module, such as its parameters, and a name in it."""

_MODULES: dict[type[nn.Module], tuple[Activation, tuple[str, ...]]] = {
    nn.Identity: (Activation.IDENTITY, ()), nn.ReLU: (Activation.RELU, ()),
    nn.LeakyReLU: (Activation.LEAKY_RELU, ("negative_slope",)), nn.ELU: (Activation.ELU, ("alpha",)),
    nn.SELU: (Activation.SELU, ()), nn.Tanh: (Activation.TANH, ()), nn.Sigmoid: (Activation.SIGMOID, ()),
    nn.SiLU: (Activation.SILU, ()), nn.Softplus: (Activation.SOFTPLUS, ("beta", "threshold")),
}  # fmt: skip
_FUNCTIONS: dict[Callable[..., Tensor], tuple[Activation, dict[str, float]]] = {
    F.relu: (Activation.RELU, {}), torch.relu: (Activation.RELU, {}),
    F.leaky_relu: (Activation.LEAKY_RELU, {"negative_slope": 0.01}), F.elu: (Activation.ELU, {"alpha": 1.0}),
    F.selu: (Activation.SELU, {}), torch.selu: (Activation.SELU, {}), F.tanh: (Activation.TANH, {}),
    torch.tanh: (Activation.TANH, {}), F.sigmoid: (Activation.SIGMOID, {}), torch.sigmoid: (Activation.SIGMOID, {}),
    F.silu: (Activation.SILU, {}), F.gelu: (Activation.GELU, {}),
    F.softplus: (Activation.SOFTPLUS, {"beta": 1.0, "threshold": 20.0}),
}  # fmt: skip
_GELU = {"none": Activation.GELU, "tanh": Activation.GELU_TANH}


class MaskedNetwork:
    """A masked network, to which its operations are added one by one.

    Value 0 is the input. Each operation adds a value, and its method returns the index of that value. The last value
    holds the parameters of all features.

    Args:
        outputs: The units of the last value that hold the P parameters of each feature, on the CPU.
        first_feature: The first column of the input that is a feature. The other columns are context.

    Attributes:
        masks: The mask of each operation, or `None`.
        tensors: The weights and biases, to which operations refer by index.
        constants: The buffers of the masks.
        context: The width of the context that layers read beside the input.
        width: The number of columns of the input.
    """

    def __init__(self, outputs: Int[Tensor, "d p"], first_feature: int = 0) -> None:
        self.outputs, self.features = outputs, slice(first_feature, first_feature + len(outputs))
        self.operations: list[Operation] = []
        self.masks: list[Any] = []
        self.tensors: list[Slot] = []
        self.constants: list[Slot] = []
        self.context = self.width = 0

    def add_linear(self, source: int, layer: Any, function: Any = None) -> int:
        """Adds function(x (mask * weight)^T + bias)."""
        if source:
            self.operations[source - 1].is_kept = True
        else:
            self.width = layer.in_features
        return self._add(OperationKind.LINEAR, source, function, layer)

    def add_activation(self, source: int, function: Any) -> int:
        """Adds function(x)."""
        return self._add(OperationKind.ACTIVATION, source, function)

    def add_sum(self, source: int, other: int) -> int:
        """Adds the sum of two values."""
        return self._add(OperationKind.SUM, source, other=other)

    def add_context(self, source: int, layer: nn.Linear, function: Any = None) -> int:
        """Adds x + function(layer(context))."""
        self.context = layer.in_features
        return self._add(OperationKind.ADD_CONTEXT, source, function, layer)

    def add_context_gate(self, source: int, layer: nn.Linear) -> int:
        """Adds x * sigmoid(layer(context))."""
        self.context = layer.in_features
        return self._add(OperationKind.GATE_CONTEXT, source, layer=layer)

    def _add(self, kind: OperationKind, source: int, function: Any = None, layer: Any = None, other: int = 0) -> int:
        activation, settings = (Activation.IDENTITY, {}) if function is None else _native_activation(function)
        operation = Operation(
            kind=kind, source=source, other=other, weight=-1, bias=-1, activation=activation, **settings
        )
        mask = None
        if layer is not None:
            _check_layer(layer)
            for name in ("weight", "bias"):
                if layer._parameters[name] is not None:
                    setattr(operation, name, len(self.tensors))
                    self.tensors.append((layer._parameters, name))
        if kind == OperationKind.LINEAR:
            mask = layer.mask.bool()
            self.constants.append((layer._buffers, "mask"))
        self.operations.append(operation)
        self.masks.append(mask)
        return len(self.operations)


def _native_activation(function: Any) -> tuple[Activation, dict[str, float]]:
    """Returns the native activation and its settings."""
    if type(function) is nn.GELU:
        return _GELU[function.approximate], {}
    if type(function) in _MODULES:
        kind, names = _MODULES[type(function)]
        return kind, {name: float(getattr(function, name)) for name in names}
    if not isinstance(function, nn.Module) and function in _FUNCTIONS:
        return _FUNCTIONS[function]
    raise UnsupportedError(f"the activation {getattr(function, '__name__', type(function).__name__)}")


def _check_layer(layer: Any) -> None:
    """Raises UnsupportedError if the layer's tensors cannot be described. Native code checks their shapes."""
    if layer._parameters.keys() != {"weight", "bias"}:
        raise UnsupportedError("a weight or bias that is not a parameter")
    if not layer.weight.is_cpu:
        raise UnsupportedError("a network on another device")


@torch.no_grad()
def find_order(network: MaskedNetwork) -> tuple[list[int], list[int], list[tuple[list[int], list[int]]]]:
    """Returns the steps of the inverse. The features of a step depend on features of earlier steps only.

    Returns:
        - All features, sorted by step.
        - The position of the first feature of each step, and D at the end.
        - For each value of the network: its units, sorted by the first step that can compute them, and the number of
          units that each step can compute. The units of the last value are the parameters, feature by feature.

    Raises:
        UnsupportedError: If the network is not autoregressive.
    """
    with torch.device("cpu"):
        step_of = _find_steps(_find_dependencies(network)[network.outputs].any(dim=1))
        first_steps = _find_first_steps(network, step_of)
        steps, features = range(int(step_of.max()) + 1), step_of.argsort(stable=True)
        units = [first.argsort(stable=True).tolist() for first in first_steps[:-1]]
        units.append(network.outputs[features].flatten().tolist())
        ready = [[int((first <= step).sum()) for step in steps] for first in first_steps]
        starts = [int((step_of < step).sum()) for step in (*steps, len(steps))]
    return features.tolist(), starts, list(zip(units, ready, strict=True))


def _find_dependencies(network: MaskedNetwork) -> Bool[Tensor, "units d"]:
    """Returns True where a unit of the last value depends on a feature, by any path through the masks."""
    features = len(network.outputs)
    values = [torch.zeros(network.width, features, dtype=torch.float32)]
    values[0][network.features] = torch.eye(features, dtype=torch.float32)
    for operation, mask in zip(network.operations, network.masks, strict=True):
        value = values[operation.source]
        if operation.kind == OperationKind.LINEAR:
            value = (mask.to(value) @ value > 0).to(value)
        elif operation.kind == OperationKind.SUM:
            value = torch.maximum(value, values[operation.other])
        values.append(value)
    return values[-1].bool()


def _find_steps(dependencies: Bool[Tensor, "d d"]) -> Int[Tensor, " d"]:
    """Returns the step at which each feature can be solved."""
    step_of = torch.full((len(dependencies),), -1)
    missing, step = dependencies.sum(dim=1), 0
    while (step_of < 0).any():
        is_solvable = (missing == 0) & (step_of < 0)
        if not is_solvable.any():
            raise UnsupportedError("a network that is not autoregressive")
        step_of[is_solvable] = step
        missing = missing - dependencies[:, is_solvable].sum(dim=1)
        step += 1
    return step_of


def _find_first_steps(network: MaskedNetwork, step_of: Int[Tensor, " d"]) -> list[Int[Tensor, " units"]]:
    """Returns the first step at which each unit of each value can be computed.

    Values that elementwise operations connect share one tensor, since they have the same units. So a residual block may
    delay its own input, and the steps are found by iteration.
    """
    of_input = torch.zeros(network.width, dtype=torch.long)
    of_input[network.features] = step_of + 1
    first_steps = [of_input]
    for operation, mask in zip(network.operations, network.masks, strict=True):
        if operation.kind == OperationKind.LINEAR:
            first_steps.append(torch.zeros(len(mask), dtype=torch.long))
        else:
            first_steps.append(first_steps[operation.source])
        if operation.kind == OperationKind.SUM:
            other = first_steps[operation.other]
            first_steps = [first_steps[-1] if steps is other else steps for steps in first_steps]
    last = first_steps[-1]
    last[network.outputs] = step_of[:, None]
    while True:
        before = [steps.clone() for steps in first_steps]
        for value, (operation, mask) in enumerate(zip(network.operations, network.masks, strict=True), start=1):
            if operation.kind == OperationKind.LINEAR:
                least = (mask * first_steps[operation.source]).amax(dim=1)
                if first_steps[value] is not last:
                    torch.maximum(first_steps[value], least, out=first_steps[value])
                elif (least > last).any():  # A residual block delays its input beyond the parameter that needs it.
                    raise UnsupportedError("a network that is not autoregressive")
        if all(torch.equal(old, new) for old, new in zip(before, first_steps, strict=True)):
            return first_steps
