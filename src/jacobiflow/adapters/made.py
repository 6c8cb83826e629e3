"""Transforms of nflows and normflows, whose MADEs, residual networks and splines are nearly the same."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jacobiflow.adapters.adapter import AcceleratedModule
from jacobiflow.adapters.library_module import library_class
from jacobiflow.adapters.native_module import LibraryCall, TransformOutput
from jacobiflow.adapters.network import LibraryNetwork
from jacobiflow.adapters.passes import invert_by_passes
from jacobiflow.errors import UnsupportedError
from jacobiflow.native.boundary import SplineBoundary, TransformKind
from jacobiflow.native.masked_network import Place
from jacobiflow.native.transforms import (
    ChainTransform,
    constant_transform,
    coupling_transform,
    lu_transform,
    masked_transform,
)

_PYTORCH_PARTS = (nn.ModuleList, nn.Linear, nn.Dropout, nn.Identity)


def made_transform(
    module: Any, library: ModuleType, is_conditional: bool, parameters: int = 2, **fields: Any
) -> ChainTransform:
    """Returns a masked transform; `library` is the Python module that defines the library's MADE."""
    network = _build_network(module.autoregressive_net, library, parameters, is_conditional)
    return masked_transform(network, **fields)


def spline_transform(module: Any, library: ModuleType, is_conditional: bool) -> ChainTransform:
    """Returns a masked rational-quadratic spline."""
    width = getattr(module.autoregressive_net, "hidden_features", 1)
    parameters, fields = spline_fields(module, module.num_bins, width)
    return made_transform(module, library, is_conditional, parameters=parameters, **fields)


def spline_fields(module: Any, bins: int, width: int = 1) -> tuple[int, dict[str, Any]]:
    """Returns the number of parameters of a feature, and the native fields; `width` is that of hidden layers."""
    if isinstance(module.tails, list | tuple) or isinstance(module.tail_bound, Tensor):
        raise UnsupportedError("a spline with tails of its own for each feature")
    bounded, circular, free = (SplineBoundary.FIXED, -1), (SplineBoundary.CIRCULAR, 0), (SplineBoundary.FREE, 1)
    boundary, more_slopes = {"linear": bounded, "circular": circular}.get(module.tails, free)
    low, high = (0.0, 1.0) if module.tails is None else (-float(module.tail_bound), float(module.tail_bound))
    return 3 * bins + more_slopes, {
        "kind": TransformKind.RATIONAL_QUADRATIC, "bins": bins, "boundary": boundary, "end_slope": 1.0,
        "logit_scale": float(width) ** -0.5, "low": low, "high": high, "has_tails": module.tails is not None,
        "min_width": module.min_bin_width, "min_height": module.min_bin_height, "min_slope": module.min_derivative,
    }  # fmt: skip


def _build_network(made: Any, library: ModuleType, parameters: int, is_conditional: bool) -> LibraryNetwork:
    """Returns the operations of a MADE. nflows applies an activation to the context, or before the blocks."""
    check_network(made, library.MADE, library.MaskedLinear, library.MaskedResidualBlock, library.MaskedFeedforwardBlock)
    if is_conditional and not hasattr(made, "context_layer"):
        raise UnsupportedError("a context for a network without")
    is_nflows = hasattr(made, "use_residual_blocks")
    network = LibraryNetwork(torch.arange(made.final_layer.out_features, device="cpu").view(-1, parameters))
    value = network.add_layer(0, made.initial_layer)
    if is_conditional:
        value = network.add_context_layer(value, made.context_layer, made.activation if is_nflows else None)
    if is_nflows and not made.use_residual_blocks:
        value = network.add_function(value, made.activation)
    for block in made.blocks:
        if hasattr(block, "linear_layers"):
            value = add_residual_block(network, value, block, is_conditional, is_gated=not is_nflows)
        else:
            value = network.add_layer(value, block.linear, block.activation)
    network.add_layer(value, made.final_layer)
    return network


def add_residual_block(network: LibraryNetwork, before: int, block: Any, is_conditional: bool, is_gated: bool) -> int:
    """Adds value + linear(act(linear(act(value)))). The context gates the second layer, or is added to the first."""
    if getattr(block.activation, "inplace", False):  # The library then adds to what the activation has overwritten.
        raise UnsupportedError("an activation in place")
    first, second = block.linear_layers
    value = network.add_layer(network.add_function(before, block.activation), first)
    if is_conditional and not is_gated:
        value = network.add_context_layer(value, block.context_layer)
    value = network.add_layer(network.add_function(value, block.activation), second)
    if is_conditional and is_gated:
        value = network.add_context_layer(value, block.context_layer, is_gate=True)
    return network.add_sum(value, before)


def check_network(network: nn.Module, kind: type[nn.Module], *of_library: type[nn.Module]) -> None:
    """Raises UnsupportedError if a network is not of this class, or has parts that are not the library's or PyTorch's.

    Batch normalisation is one of these.
    """
    activations = {module._modules.get("activation") for module in network.modules()}
    if type(network) is not kind:
        raise UnsupportedError(f"the network {type(network).__name__}")
    for part in network.modules():
        if type(part) not in (kind, *of_library, *_PYTORCH_PARTS) and part not in activations:
            raise UnsupportedError(f"{type(part).__name__} in its network")


def spline_coupling(module: Any, nets: Sequence[type[nn.Module]], is_conditional: bool) -> ChainTransform:
    """Returns a coupling of rational-quadratic splines, see `residual_coupling`."""
    parameters, fields = spline_fields(module, module.num_bins, getattr(module.transform_net, "hidden_features", 1))
    outputs = torch.arange(len(module.transform_features) * parameters, device="cpu").view(-1, parameters)
    return residual_coupling(module, nets, outputs, is_conditional, **fields)


def residual_coupling(
    module: Any, nets: Sequence[type[nn.Module]], outputs: Int[Tensor, "d p"], is_conditional: bool, **fields: Any
) -> ChainTransform:
    """Returns a coupling with a ResidualNet, which reads the context after its features.

    Args:
        module: The library's coupling.
        nets: The library's ResidualNet and ResidualBlock.
        outputs: See `MaskedNetwork`.
        is_conditional: Whether there is a context.
        fields: Those of `coupling_transform`.
    """
    net, identity = module.transform_net, module.identity_features.tolist()
    if type(net).__name__ == "ContextSplineMap":  # sbi's, in a flow of one feature
        network = LibraryNetwork(outputs, range(net.spline_predictor[0].in_features), inputs=0)
        network.add_layers(0, net.spline_predictor)
    else:
        check_network(net, *nets)
        if is_conditional and net.context_features is None:
            raise UnsupportedError("a context for a network without")
        if getattr(net, "preprocessing", None) is not None:  # Networks of normflows may have it.
            raise UnsupportedError("a network with preprocessing")
        inputs, width = len(identity), net.context_features if is_conditional else 0
        network = LibraryNetwork(outputs, range(inputs, inputs + width), inputs)
        value = network.add_layer(0, net.initial_layer)
        for block in net.blocks:
            value = add_residual_block(network, value, block, is_conditional, is_gated=True)
        network.add_layer(value, net.final_layer)
    return coupling_transform(network, identity, module.transform_features.tolist(), **fields)


def constant_spline(module: Any, features: int, transformed: Sequence[int]) -> ChainTransform:
    """Returns the spline of a PiecewiseRationalQuadraticCDF on some of the features."""
    places = places_of(module, "unnormalized_widths", "unnormalized_heights", "unnormalized_derivatives")
    _, fields = spline_fields(module, module.unnormalized_widths.shape[-1])
    return constant_transform(places, features, transformed, **fields)


def lu_layer_transform(module: Any) -> ChainTransform:
    """Returns the transform of an LULinear."""
    lower, upper, diagonal, shift = places_of(
        module, "lower_entries", "upper_entries", "unconstrained_upper_diag", "bias"
    )
    return lu_transform(lower, upper, diagonal, shift, min_scale=module.eps)


def places_of(module: nn.Module, *names: str) -> list[Place]:
    """Returns the places of parameters."""
    if not module._parameters.keys() >= {*names}:
        raise UnsupportedError("a weight that is not a parameter")
    return [(module._parameters, name) for name in names]


class AcceleratedComposition(AcceleratedModule):
    """A coupling, or a composition whose transforms native code computes together."""

    def forward(self, inputs: Float[Tensor, "b d"], context: Float[Tensor, "b c"] | None = None) -> Sequence[Tensor]:
        """Returns z and log|det dz/dinputs| (B,), as the library does."""
        call = partial(_library_call, "forward")
        return evaluate_by_native(self, call, inputs, context, False) or super().forward(inputs, *context_args(context))

    def inverse(self, inputs: Float[Tensor, "b d"], context: Float[Tensor, "b c"] | None = None) -> Sequence[Tensor]:
        """Returns x and log|det dx/dinputs| (B,), as the library does."""
        call = partial(_library_call, "inverse")
        return evaluate_by_native(self, call, inputs, context, is_inverse=True) or self._invert(inputs, context)

    def _invert(self, inputs: Tensor, context: Tensor | None) -> Sequence[Tensor]:
        return super().inverse(inputs, *context_args(context))  # type: ignore[misc]


class AcceleratedTransform(AcceleratedComposition):
    """A masked transform."""

    autoregressive_net: Any
    _elementwise_inverse: Any

    def _invert(self, inputs: Tensor, context: Tensor | None) -> Sequence[Tensor]:
        def step(network: Any, x: Tensor) -> Sequence[Tensor]:
            return self._elementwise_inverse(inputs, network(x, context))

        if inputs.ndim < 2:  # The library refuses them.
            return super()._invert(inputs, context)
        network, passes = self.autoregressive_net, inputs.shape[1:].numel()
        outputs = invert_by_passes(self.acceleration, self, step, network, inputs, context, passes)
        return super()._invert(inputs, context) if outputs is None else tuple(outputs)


def _library_call(method: str, module: Any, x: Tensor, context: Tensor | None) -> TransformOutput:
    return getattr(library_class(module), method)(module, x, *context_args(context))


def evaluate_by_native(
    module: AcceleratedModule, library_call: LibraryCall, x: Tensor, context: Tensor | None, is_inverse: bool
) -> tuple[Tensor, Tensor] | None:
    """Returns the results of a call of the library by native code; `None` if they are left to the library."""
    if x.ndim != 2 or (context is not None and (context.ndim != 2 or context.shape[0] != x.shape[0])):
        return None
    result: Any = module.acceleration.evaluate(module, x, context, is_inverse, library_call, "rows")
    return result


def context_args(context: Tensor | None) -> tuple[Tensor, ...]:
    """Returns the context as arguments of a call, as some of the libraries' methods do not take `None`."""
    return () if context is None else (context,)
