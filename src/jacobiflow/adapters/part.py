"""One transform of a library in the form that native code takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from jacobiflow.adapters.network import MaskedNetwork, Slot, UnsupportedError
from jacobiflow.adapters.order import find_order
from jacobiflow.native.masked import masked_transform, permutation
from jacobiflow.native.structures import Elementwise, Transform


@dataclass(frozen=True)
class Part:
    """A transform for native code, which reads the values of its tensors at every call.

    Attributes:
        module: The library's transform.
        transform: Its operations count `tensors` first, then `constants`.
        memory: Arrays that have to live as long as `transform`.
        features: D, or `None` if it takes any.
        context: The width of the context that its network takes, or `None` if it has no network.
        tensors: Weights, biases, scales and shifts.
        constants: Masks and indices.
    """

    module: nn.Module
    transform: Transform
    memory: Any
    features: int | None
    context: int | None = None
    tensors: Sequence[Slot] = ()
    constants: Sequence[Slot] = ()


def masked_part(module: nn.Module, network: MaskedNetwork, **settings: Any) -> Part:
    """Returns an elementwise transform with the parameters that a masked network gives.

    Args:
        module: The library's transform.
        network: The network.
        settings: Fields of `Transform` for the elementwise transform.
    """
    order = find_order(network)
    for operation, units in zip(network.operations, order.units[1:], strict=True):
        operation.units = len(units)
        if operation.mask >= 0:
            operation.mask += len(network.tensors)
    inputs, *others = zip(order.units, order.ready, strict=True)
    operations = [(operation, *other) for operation, other in zip(network.operations, others, strict=True)]
    features, parameters = network.outputs.shape
    context_columns = network.width - features
    transform, memory = masked_transform(
        order.starts, order.features, operations, inputs, features=features, parameters=parameters,
        context=context_columns, context_start=0 if network.features.start else features, **settings,
    )  # fmt: skip
    context = context_columns or network.context
    return Part(module, transform, memory, features, context, network.tensors, network.masks)


def permutation_part(module: nn.Module, order: Sequence[int], slot: Slot | None = None) -> Part:
    """Returns the transform y_i = x_order[i]; `slot` is the tensor that holds the order."""
    transform, memory = permutation(order)
    return Part(module, transform, memory, len(order), constants=() if slot is None else (slot,))


def affine_part(module: nn.Module, scale: Slot, shift: Slot) -> Part:
    """Returns the transform y = scale x + shift, of one number or of one for each feature."""
    sizes = [holder[name].numel() for holder, name in (scale, shift)]
    features = max(sizes)
    if any(size not in (1, features) for size in sizes):
        raise UnsupportedError("an affine transform of another shape")
    strides = [int(size > 1) for size in sizes]
    transform = Transform(kind=Elementwise.AFFINE, scale_stride=strides[0], shift_stride=strides[1])
    return Part(module, transform, None, features if features > 1 else None, tensors=(scale, shift))
