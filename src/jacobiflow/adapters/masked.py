"""A masked network as a list of operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F

from jacobiflow.native.structures import Function

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


class UnsupportedError(Exception):
    """A part of a transform that native code does not take."""


def activation(function: Any) -> tuple[Function, tuple[float, ...]]:
    """The activation, and its settings.

    Raises:
        UnsupportedError: If `function` is another.
    """
    if isinstance(function, nn.Module):
        check_plain(function)
        if type(function) is nn.GELU:
            return _GELU[function.approximate], ()
        if type(function) in _MODULES:
            kind, names = _MODULES[type(function)]
            return kind, tuple(float(getattr(function, name)) for name in names)
    elif isinstance(function, Callable) and function in _FUNCTIONS:  # type: ignore[arg-type]
        return _FUNCTIONS[function]
    raise UnsupportedError(f"the activation {getattr(function, '__name__', type(function).__name__)}")


@dataclass(frozen=True)
class Linear:
    """The product of a value and mask * weight, with the bias."""

    source: int
    layer: Any


@dataclass(frozen=True)
class Activation:
    """An elementwise function of a value."""

    source: int
    function: Any


@dataclass(frozen=True)
class Sum:
    """The sum of two values."""

    source: int
    other: int


@dataclass(frozen=True)
class Context:
    """A value plus function(layer(context)), or times the sigmoid of that if it is a `gate`."""

    source: int
    layer: Any
    function: Any
    gate: bool = False


Operation = Linear | Activation | Sum | Context


@dataclass(frozen=True)
class MaskedNetwork:
    """Value 0 is the network's input, operation i gives value i + 1, and the last value holds the parameters.

    `features` are the columns of x in the input, the other columns are context. `outputs` (D, P) are the units that
    hold the parameters of each feature; they are on the CPU.
    """

    operations: tuple[Operation, ...]
    features: slice
    outputs: Int[Tensor, "d p"]

    @property
    def width(self) -> int:
        """Of the input: features and context."""
        return self.layers[0].mask.shape[1]

    @property
    def layers(self) -> list[Any]:
        """The masked layers."""
        return [operation.layer for operation in self.operations if isinstance(operation, Linear)]


def chain(modules: Sequence[nn.Module], linear: type[nn.Module], residual: type[nn.Module]) -> tuple[Operation, ...]:
    """The operations of a sequence of masked layers, activations and residual blocks."""
    operations: list[Operation] = []

    def add(modules: Sequence[nn.Module], value: int) -> int:
        for module in modules:
            check_plain(module)
            if type(module) is linear:
                operations.append(Linear(value, module))
            elif type(module) is residual:
                operations.append(Sum(add(list(module.children()), value), value))
            else:
                operations.append(Activation(value, module))
            value = len(operations)
        return value

    add(modules, 0)
    return tuple(operations)


def check_plain(*modules: nn.Module) -> None:
    """Checks that nothing but the `forward` of its class runs when a module is called.

    Raises:
        UnsupportedError: If a module has hooks, or a `forward` of its own.
    """
    for module in modules:
        if module._forward_pre_hooks or module._forward_hooks:
            raise UnsupportedError(f"a hook on {type(module).__name__}")
        if "forward" in vars(module):
            raise UnsupportedError(f"a forward of its own on {type(module).__name__}")
