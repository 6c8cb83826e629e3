"""A transform of a library as native code takes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from jacobiflow.adapters.masked import (
    Activation,
    Context,
    Linear,
    MaskedNetwork,
    Sum,
    UnsupportedError,
    activation,
    check_plain,
)
from jacobiflow.adapters.order import Order, find_order
from jacobiflow.native.masked import masked_transform, permutation
from jacobiflow.native.structures import Elementwise, Kind, Operation, Transform

Slot = tuple[dict[str, Any], str]
"""Where a module holds something: one of its dictionaries, and the name in it."""

_DROPOUTS = (nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout)
_MASKS = (torch.bool, torch.float32, torch.float64)


@dataclass(frozen=True)
class Description:
    """All that native code has to know of a transform.

    Attributes:
        module: Holds all parts of the transform.
        settings: Fields of `native.masked.Transform` for the elementwise transform.
        network: Gives the parameters; `None` for a permutation or an affine transform.
        tensors: Scale and shift of an affine transform.
        order: Of a permutation y_i = x_order[i].
        constants: Tensors on which the description depends, beside the masks.
        attributes: Other values on which it depends.
    """

    module: nn.Module
    settings: Mapping[str, Any] = field(default_factory=dict)
    network: MaskedNetwork | None = None
    tensors: tuple[Slot, ...] = ()
    order: Sequence[int] | None = None
    constants: tuple[Slot, ...] = ()
    attributes: tuple[Slot, ...] = ()


class ChangedError(Exception):
    """A module is no longer as it was described."""


@dataclass(frozen=True)
class Watch:
    """All that a description depends on, to notice at a call if it has changed since.

    Attributes:
        modules: With their classes and what they hold.
        attributes: Dictionaries and names, with the values.
        constants: Masks and the like, with their versions.
    """

    modules: tuple[tuple[nn.Module, type, tuple[nn.Module | None, ...]], ...] = ()
    attributes: tuple[tuple[dict[str, Any], str, Any], ...] = ()
    constants: tuple[tuple[dict[str, Any], str, Tensor, int], ...] = ()

    @staticmethod
    def of(modules: Iterable[nn.Module], attributes: Iterable[Slot] = (), constants: Iterable[Slot] = ()) -> Watch:
        """As they are now."""
        return Watch(
            tuple((module, type(module), tuple(module._modules.values())) for module in modules),
            tuple((holder, name, holder.get(name)) for holder, name in attributes),
            tuple((holder, name, holder[name], _version(holder[name])) for holder, name in constants),
        )

    def __add__(self, other: Watch) -> Watch:
        return Watch(self.modules + other.modules, self.attributes + other.attributes, self.constants + other.constants)

    def check(self) -> None:
        """Checks that nothing has changed, and that a call of a module runs its class's `forward` and nothing else.

        Raises:
            ChangedError: If something has.
        """
        for module, kind, children in self.modules:
            state = module.__dict__
            if (
                type(module) is not kind or state["_forward_hooks"] or state["_forward_pre_hooks"]
                or "forward" in state or tuple(state["_modules"].values()) != children
            ):  # fmt: skip
                raise ChangedError
        for holder, name, value in self.attributes:
            now = holder.get(name)
            if now is not value and now != value:
                raise ChangedError
        for holder, name, tensor, version in self.constants:
            if holder.get(name) is not tensor or tensor._version != version:
                raise ChangedError


@dataclass(frozen=True)
class Part:
    """A transform for native code. The values of its tensors are read at every call.

    Attributes:
        transform: For native code; its operations count `tensors` first, then the constants of `watch`.
        memory: What lives as long as `transform`.
        features: D, or `None` if it takes any.
        context: The width of the context that its network takes, or 0; `None` if it has no network.
        tensors: Weights and biases.
        watch: What all this depends on.
    """

    transform: Transform
    memory: Any
    features: int | None
    context: int | None
    tensors: tuple[Slot, ...]
    watch: Watch


def part_of(description: Description) -> Part:
    """The part that a description stands for.

    Raises:
        UnsupportedError: If native code does not take it.
    """
    modules = list(description.module.modules())
    check_plain(*modules)  # or it would be described again at each call
    if any(isinstance(module, _DROPOUTS) and module.training and module.p > 0 for module in modules):
        raise UnsupportedError("dropout in training mode")
    network, tensors, constants = description.network, description.tensors, description.constants
    for layer in [] if network is None else _layers(network):
        _check_shapes(layer)
    context = None if network is None else _context_width(network)
    features: int | None = None
    if network is not None:
        order = find_order(network)
        if order is None:
            raise UnsupportedError("a network that is not autoregressive")
        tensors, masks = _tensors(network)
        constants = (*constants, *masks)
        features = len(network.outputs)
        transform, memory = _masked(network, order, description.settings, len(tensors))
    elif description.order is not None:
        features = len(description.order)
        transform, memory = permutation(description.order)
    else:
        sizes = [holder[name].numel() for holder, name in tensors]
        features = max(sizes) if max(sizes) > 1 else None
        if any(size not in (1, features) for size in sizes):
            raise UnsupportedError("an affine transform of another shape")
        scale, shift = (int(size > 1) for size in sizes)
        transform, memory = Transform(kind=Elementwise.AFFINE, scale_stride=scale, shift_stride=shift), None
    watch = Watch.of(modules, (*description.attributes, *_settings(modules)), constants)
    return Part(transform, memory, features, context, tensors, watch)


def _version(tensor: Tensor) -> int:
    if tensor.is_inference():
        raise UnsupportedError("masks that were made in inference mode")
    if not tensor.is_cpu or not tensor.is_contiguous():
        raise UnsupportedError("masks on another device" if not tensor.is_cpu else "masks that are not contiguous")
    return tensor._version


def _context_width(network: MaskedNetwork) -> int:
    for operation in network.operations:
        if isinstance(operation, Context):
            return operation.layer.weight.shape[1]
    return network.width - len(network.outputs)


def _layers(network: MaskedNetwork) -> list[Any]:
    return [operation.layer for operation in network.operations if isinstance(operation, Linear | Context)]


def _check_shapes(layer: Any) -> None:
    """Checks that the tensors of a layer are of the shapes that native code reads, and masks of types that it knows."""
    if layer._parameters.keys() != {"weight", "bias"}:
        raise UnsupportedError("a weight or bias that is not a parameter")
    size = (layer.out_features, layer.in_features)
    if not layer.weight.shape == getattr(layer, "mask", layer.weight).shape == size:
        raise UnsupportedError("a weight or mask of another shape")
    if hasattr(layer, "mask") and layer.mask.dtype not in _MASKS:
        raise UnsupportedError(f"a mask of {layer.mask.dtype}")
    if layer.bias is not None and layer.bias.shape != size[:1]:
        raise UnsupportedError("a bias of another shape")


def _tensors(network: MaskedNetwork) -> tuple[tuple[Slot, ...], tuple[Slot, ...]]:
    """Weights and biases, layer by layer; and the masks."""
    tensors: list[Slot] = []
    for layer in _layers(network):
        tensors.append((layer._parameters, "weight"))
        if layer._parameters["bias"] is not None:
            tensors.append((layer._parameters, "bias"))
    return tuple(tensors), tuple((layer._buffers, "mask") for layer in network.layers)


def _masked(network: MaskedNetwork, order: Order, settings: Mapping[str, Any], masks: int) -> tuple[Transform, Any]:
    """The transform of a masked network, whose masks come after `masks` other tensors."""
    operations: list[tuple[Operation, list[int], list[int]]] = []
    reads = [operation.source for operation in network.operations]
    reads += [operation.other for operation in network.operations if isinstance(operation, Sum)]
    read_later = {operation.source for operation in network.operations if isinstance(operation, Linear)}
    tensor, mask, values = 0, masks, {0: 0}  # values: where those of the network are among the operations'
    for value, operation in enumerate(network.operations, start=1):
        source = values[operation.source]
        before = network.operations[operation.source - 1] if operation.source else None
        if isinstance(operation, Activation) and isinstance(before, Linear) and reads.count(operation.source) == 1:
            entry, values[value] = operations[source - 1][0], source  # the layer gives it at once
            entry.is_kept = value in read_later
            _set_function(entry, operation.function)
            continue
        entry = Operation(
            source=source, units=len(order.units[value]), is_kept=value in read_later, weight=-1, bias=-1, mask=-1
        )
        if isinstance(operation, Linear | Context):
            entry.weight, tensor = tensor, tensor + 1
            if operation.layer._parameters["bias"] is not None:
                entry.bias, tensor = tensor, tensor + 1
        if isinstance(operation, Linear):
            entry.kind, entry.mask, mask = Kind.LINEAR, mask, mask + 1
            entry.mask_bytes = operation.layer.mask.itemsize
        elif isinstance(operation, Sum):
            entry.kind, entry.other = Kind.SUM, values[operation.other]
        else:
            entry.kind = Kind.ACTIVATION
            if isinstance(operation, Context):
                entry.kind = Kind.GATE_CONTEXT if operation.gate else Kind.ADD_CONTEXT
            _set_function(entry, operation.function)
        operations.append((entry, order.units[value], order.known[value]))
        values[value] = len(operations)
    start, stop = network.features.start, network.features.stop
    return masked_transform(
        order.starts, order.features, operations, (order.units[0], order.known[0]), features=len(network.outputs),
        parameters=network.outputs.shape[1], context=network.width - len(network.outputs),
        context_start=0 if start else stop, **settings,
    )  # fmt: skip


def _set_function(operation: Operation, function: Any) -> None:
    operation.function, settings = activation(function)
    operation.first, operation.second = (*settings, 0.0, 0.0)[:2]


def _settings(modules: Sequence[nn.Module]) -> list[Slot]:
    """The settings of activations and dropout layers among the modules."""
    names = ("negative_slope", "alpha", "beta", "threshold", "approximate", "p")
    settings = [(vars(module), name) for module in modules for name in names if name in vars(module)]
    return settings + [(vars(module), "training") for module in modules if isinstance(module, _DROPOUTS)]
