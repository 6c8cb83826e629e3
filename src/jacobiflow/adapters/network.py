"""Masked networks of a library's layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jacobiflow.errors import UnsupportedError
from jacobiflow.native.boundary import Activation
from jacobiflow.native.masked_network import MaskedNetwork

_MODULES: dict[type[nn.Module], tuple[Activation, tuple[str, ...]]] = {
    nn.Identity: (Activation.IDENTITY, ()), nn.ReLU: (Activation.RELU, ()),
    nn.LeakyReLU: (Activation.LEAKY_RELU, ("negative_slope",)), nn.ELU: (Activation.ELU, ("alpha",)),
    nn.SELU: (Activation.SELU, ()), nn.Tanh: (Activation.TANH, ()), nn.Sigmoid: (Activation.SIGMOID, ()),
    nn.SiLU: (Activation.SILU, ()), nn.Softplus: (Activation.SOFTPLUS, ("beta", "threshold")),
}  # fmt: skip
_FUNCTIONS: dict[Callable[..., Tensor], nn.Module] = {
    F.relu: nn.ReLU(), torch.relu: nn.ReLU(), F.leaky_relu: nn.LeakyReLU(), F.elu: nn.ELU(), F.selu: nn.SELU(),
    torch.selu: nn.SELU(), F.tanh: nn.Tanh(), torch.tanh: nn.Tanh(), F.sigmoid: nn.Sigmoid(),
    torch.sigmoid: nn.Sigmoid(), F.silu: nn.SiLU(), F.gelu: nn.GELU(), F.softplus: nn.Softplus(),
}  # fmt: skip
_GELU = {"none": Activation.GELU, "tanh": Activation.GELU_TANH}


class LibraryNetwork(MaskedNetwork):
    """A masked network to which a library's layers are added. Arguments named `function` are activations."""

    def add_layer(self, source: int, layer: Any, function: Any = None) -> int:
        """Adds function(layer(x)) of a masked or dense layer."""
        has_bias, mask = self._add_places(layer), layer._buffers.get("mask")
        mask = None if mask is None else mask.bool().cpu()
        return self.add_linear(source, layer.out_features, mask, has_bias, **_activation_fields(function))

    def add_layers(
        self, value: int, layers: Iterable[nn.Module], linear: Sequence[type[nn.Module]] = (nn.Linear,),
        residual: type[nn.Module] | None = None,
    ) -> int:  # fmt: skip
        """Adds layers, activations and residual blocks of these classes, one after the other."""
        remaining = [layer for layer in layers if type(layer) is not nn.Dropout]
        while remaining:
            layer, *remaining = remaining
            if type(layer) in linear:
                is_next_function = remaining and type(remaining[0]) not in (*linear, residual)
                value = self.add_layer(value, layer, remaining.pop(0) if is_next_function else None)
            elif type(layer) is residual:
                value = self.add_sum(self.add_layers(value, layer.children(), linear, residual), value)
            else:
                value = self.add_function(value, layer)
        return value

    def add_function(self, source: int, function: Any) -> int:
        """Adds function(x)."""
        return self.add_activation(source, **_activation_fields(function))

    def add_context_layer(self, source: int, layer: nn.Linear, function: Any = None, is_gate: bool = False) -> int:
        """Adds x + function(layer(context)), or for a gate x * sigmoid(layer(context))."""
        has_bias, activation = self._add_places(layer), _activation_fields(function)
        return self.add_context(source, layer.in_features, has_bias, is_gate, **activation)

    def _add_places(self, layer: Any) -> bool:
        """Adds the places of the weight and the bias of a layer; returns False if it has no bias."""
        if layer._parameters.keys() != {"weight", "bias"}:
            raise UnsupportedError("a weight or bias that is not a parameter")
        has_bias = layer.bias is not None
        self.places += [(layer._parameters, name) for name in ("weight", "bias")[: 1 + has_bias]]
        return has_bias


def find_identical(values: Mapping[Any, Any], function: Any) -> Any:
    """Returns the value of a function, which need not be hashable, or `None`."""
    return next((value for key, value in values.items() if key is function), None)


def _activation_fields(function: Any) -> dict[str, Any]:
    """Returns the fields of `boundary.Operation` that describe an activation; none for `None`."""
    if function is None:
        return {}
    module: Any = function if isinstance(function, nn.Module) else find_identical(_FUNCTIONS, function)
    if type(module) is nn.GELU:
        return {"activation": _GELU[module.approximate]}
    if type(module) in _MODULES:
        kind, names = _MODULES[type(module)]
        return {"activation": kind, **{name: float(getattr(module, name)) for name in names}}
    raise UnsupportedError(f"the activation {getattr(function, '__name__', type(function).__name__)}")
