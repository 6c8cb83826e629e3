"""A masked network as a list of operations for native code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F

from jacobiflow.native.structures import Function, Kind, Operation

Slot = tuple[dict[str, Any], str]
"""A dictionary of a module (its parameters, say) and a name in it."""

_MODULES: dict[type[nn.Module], tuple[Function, tuple[str, ...]]] = {
    nn.Identity: (Function.IDENTITY, ()), nn.ReLU: (Function.RELU, ()),
    nn.LeakyReLU: (Function.LEAKY_RELU, ("negative_slope",)), nn.ELU: (Function.ELU, ("alpha",)),
    nn.SELU: (Function.SELU, ()), nn.Tanh: (Function.TANH, ()), nn.Sigmoid: (Function.SIGMOID, ()),
    nn.SiLU: (Function.SILU, ()), nn.Softplus: (Function.SOFTPLUS, ("beta", "threshold")),
}  # fmt: skip
_FUNCTIONS: dict[Callable[..., Tensor], tuple[Function, tuple[float, ...]]] = {
    F.relu: (Function.RELU, ()), torch.relu: (Function.RELU, ()), F.leaky_relu: (Function.LEAKY_RELU, (0.01,)),
    F.elu: (Function.ELU, (1.0,)), F.selu: (Function.SELU, ()), torch.selu: (Function.SELU, ()),
    F.tanh: (Function.TANH, ()), torch.tanh: (Function.TANH, ()), F.sigmoid: (Function.SIGMOID, ()),
    torch.sigmoid: (Function.SIGMOID, ()), F.silu: (Function.SILU, ()), F.gelu: (Function.GELU, ()),
    F.softplus: (Function.SOFTPLUS, (1.0, 20.0)),
}  # fmt: skip
_GELU = {"none": Function.GELU, "tanh": Function.GELU_TANH}
_MASK_TYPES = (torch.bool, torch.float32, torch.float64)


class UnsupportedError(Exception):
    """A part of a transform that native code does not take."""


class MaskedNetwork:
    """A masked network, built operation by operation.

    Value 0 is the input, each operation makes the next value, and the last value holds the parameters. The methods that
    add an operation return the index of its value.

    Args:
        outputs: The units of the last value that hold the P parameters of each feature; on the CPU.
        first_feature: The column of the input at which the features start; the other columns are context.

    Attributes:
        operations: They lack `units`, `rows` and `ready`, which the order of the units gives.
        layers: The layer of each operation, or `None`.
        tensors: The weights and biases that operations count.
        masks: The masks that operations count.
        context: The width of the context that layers read beside the input.
    """

    def __init__(self, outputs: Int[Tensor, "d p"], first_feature: int = 0) -> None:
        self.outputs, self.features = outputs, slice(first_feature, first_feature + len(outputs))
        self.operations: list[Operation] = []
        self.layers: list[Any] = []
        self.tensors: list[Slot] = []
        self.masks: list[Slot] = []
        self.context = 0

    @property
    def width(self) -> int:
        """The number of columns of the input."""
        return self.layers[0].in_features

    def linear(self, source: int, layer: Any, function: Any = None) -> int:
        """Adds function(x (mask * weight)^T + bias)."""
        if source:
            self.operations[source - 1].is_kept = True
        return self._add(Kind.LINEAR, source, function, layer)

    def activation(self, source: int, function: Any) -> int:
        """Adds function(x)."""
        return self._add(Kind.ACTIVATION, source, function)

    def sum(self, source: int, other: int) -> int:
        """Adds the sum of two values."""
        return self._add(Kind.SUM, source, other=other)

    def add_context(self, source: int, layer: nn.Linear, function: Any = None) -> int:
        """Adds x + function(layer(context))."""
        self.context = layer.in_features
        return self._add(Kind.ADD_CONTEXT, source, function, layer)

    def gate_by_context(self, source: int, layer: nn.Linear) -> int:
        """Adds x * sigmoid(layer(context))."""
        self.context = layer.in_features
        return self._add(Kind.GATE_CONTEXT, source, layer=layer)

    def _add(self, kind: Kind, source: int, function: Any = None, layer: Any = None, other: int = 0) -> int:
        operation = Operation(kind=kind, source=source, other=other, weight=-1, bias=-1, mask=-1)
        if function is not None:
            operation.function, settings = _activation(function)
            operation.first, operation.second = (*settings, 0.0, 0.0)[:2]
        if layer is not None:
            _check_layer(layer)
            for name in ("weight", "bias"):
                if layer._parameters[name] is not None:
                    setattr(operation, name, len(self.tensors))
                    self.tensors.append((layer._parameters, name))
        if kind == Kind.LINEAR:
            operation.mask, operation.mask_bytes = len(self.masks), layer.mask.itemsize
            self.masks.append((layer._buffers, "mask"))
        self.operations.append(operation)
        self.layers.append(layer)
        return len(self.operations)


def _activation(function: Any) -> tuple[Function, tuple[float, ...]]:
    """The activation and its settings."""
    if type(function) is nn.GELU:
        return _GELU[function.approximate], ()
    if type(function) in _MODULES:
        kind, names = _MODULES[type(function)]
        return kind, tuple(float(getattr(function, name)) for name in names)
    if not isinstance(function, nn.Module) and function in _FUNCTIONS:
        return _FUNCTIONS[function]
    raise UnsupportedError(f"the activation {getattr(function, '__name__', type(function).__name__)}")


def _check_layer(layer: Any) -> None:
    """Checks that native code can read the layer's tensors: a parametrization or a new weight may differ in shape."""
    if layer._parameters.keys() != {"weight", "bias"}:
        raise UnsupportedError("a weight or bias that is not a parameter")
    size = (layer.out_features, layer.in_features)
    if not layer.weight.shape == getattr(layer, "mask", layer.weight).shape == size:
        raise UnsupportedError("a weight or mask of another shape")
    if hasattr(layer, "mask") and layer.mask.dtype not in _MASK_TYPES:
        raise UnsupportedError(f"a mask of {layer.mask.dtype}")
    if layer.bias is not None and layer.bias.shape != size[:1]:
        raise UnsupportedError("a bias of another shape")
