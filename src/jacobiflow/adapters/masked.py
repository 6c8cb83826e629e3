"""A masked network as a list of operations, and what its masks say of the order in which units can be computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F

Function = Callable[[Tensor], Tensor]

_MODULES = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid,
            nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Hardtanh, nn.Hardswish, nn.Identity)  # fmt: skip
_FUNCTIONS = (F.relu, torch.relu, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, torch.tanh, F.tanh,
              torch.sigmoid, F.sigmoid, F.softplus, F.softsign, F.logsigmoid, torch.sin, torch.cos)  # fmt: skip


_IN_PLACE: dict[Any, Function] = {
    nn.ReLU: torch.relu_, F.relu: torch.relu_, torch.relu: torch.relu_,
    nn.Tanh: torch.tanh_, F.tanh: torch.tanh_, torch.tanh: torch.tanh_,
}  # fmt: skip


def _in_place(function: Function) -> Function:
    return _IN_PLACE.get(type(function) if isinstance(function, nn.Module) else function, function)


def is_elementwise(function: Any) -> bool:
    """Whether `function` is an activation of PyTorch that takes each entry by itself."""
    if isinstance(function, nn.Module):
        hooked = function._forward_pre_hooks or function._forward_hooks or "forward" in vars(function)
        return type(function) in _MODULES and not hooked
    return function in _FUNCTIONS


@dataclass(frozen=True)
class Linear:
    """The product of a value and mask * weight, with the bias."""

    source: int
    layer: Any


@dataclass(frozen=True)
class Activation:
    """An elementwise function of a value."""

    source: int
    function: Function


@dataclass(frozen=True)
class Sum:
    """The sum of two values."""

    source: int
    other: int


@dataclass(frozen=True)
class Context:
    """A value plus function(layer(context)), or times the sigmoid of that where it is a `gate`."""

    source: int
    layer: nn.Module
    function: Function
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

    def activation(self, value: int) -> Function:
        """The function of the `Activation` that gives `value`, in place where nothing else reads its argument."""
        operation = self.operations[value - 1]
        assert isinstance(operation, Activation)
        return operation.function if operation.source in self._read_again else _in_place(operation.function)

    @cached_property
    def _read_again(self) -> set[int]:
        read = [operation.source for operation in self.operations]
        read += [operation.other for operation in self.operations if isinstance(operation, Sum)]
        return {value for value in read if read.count(value) > 1}

    @property
    def layers(self) -> list[Any]:
        """The masked layers."""
        return [operation.layer for operation in self.operations if isinstance(operation, Linear)]


def chain(modules: Sequence[nn.Module], linear: type[nn.Module], residual: type[nn.Module]) -> list[Operation] | None:
    """The operations of a sequence of masked layers, activations and residual blocks; `None` where others are in it."""
    operations: list[Operation] = []

    def add(modules: Sequence[nn.Module], value: int) -> int | None:
        for module in modules:
            if type(module) is linear and not has_hooks(module):
                operations.append(Linear(value, module))
            elif type(module) is residual and not has_hooks(module):
                inner = add(list(module.children()), value)
                if inner is None:
                    return None
                operations.append(Sum(inner, value))
            elif is_elementwise(module):
                operations.append(Activation(value, module))
            else:
                return None
            value = len(operations)
        return value

    return None if add(modules, 0) is None else operations


def has_hooks(module: nn.Module) -> bool:
    """Whether something else than its `forward` may run when a module is called."""
    return bool(module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module))
