"""Describes a MAF block to native code."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from jacobiflow.models.masked_network import count_units_below
from jacobiflow.native.boundary import Activation, Operation, OperationKind, TransformKind
from jacobiflow.native.chain import TransformChain
from jacobiflow.native.masked import MaskedOperation, Steps, masked_transform

_Units = tuple[list[int], list[int]]  # As `MaskedOperation` takes them.


class NativeLayout(NamedTuple):
    """The tensors of a block in the order that native code takes them.

    First come weight and bias of each layer, then the embedding of classes of each layer. Guidance adds the biases of
    each layer of the unconditional network, and the guidance weights.
    """

    shapes: tuple[torch.Size, ...]
    num_layers: int
    has_classes: bool
    is_guided: bool

    @property
    def unconditional_biases(self) -> int:
        """The index of the first bias of the unconditional network."""
        return (3 if self.has_classes else 2) * self.num_layers


@lru_cache(maxsize=32)
def describe_block(layout: NativeLayout) -> TransformChain:
    """Returns the chain of one transform that native code evaluates for a block."""
    tokens = layout.shapes[0][1]
    outputs = list(range(2 * tokens)), [2 * token + 2 for token in range(tokens)]
    operations = _describe_network(layout, outputs, 0, is_unconditional=False)
    if layout.is_guided:
        value = len(operations)
        operations += _describe_network(layout, outputs, value, is_unconditional=True)
        tensors = {"other": len(operations), "bias": layout.unconditional_biases + layout.num_layers}
        operations.append(_operation(OperationKind.EXTRAPOLATION, outputs, value, **tensors))
    order = list(range(tokens))
    classes = layout.shapes[2 * layout.num_layers][1] if layout.has_classes else 0
    transform = masked_transform(
        Steps(order, [*order, tokens], (order, order)), operations, layout.shapes, parameters=2, own_context=classes,
        kind=TransformKind.LOG_AFFINE,
    )  # fmt: skip
    return TransformChain([(transform, False)])


def _describe_network(
    layout: NativeLayout, outputs: _Units, num_before: int, is_unconditional: bool
) -> list[MaskedOperation]:
    """Returns the operations of a network; value 0 is its input, and `num_before` operations come before its first."""
    units, tokens = layout.shapes[0]
    hidden = list(range(units)), [count_units_below(token, tokens, units) for token in range(tokens)]
    operations: list[MaskedOperation] = []
    source = 0

    for layer in range(layout.num_layers):
        is_hidden = layer + 1 < layout.num_layers
        order, activation = outputs, {}
        if is_hidden:
            order, activation = hidden, {"activation": Activation.RELU, "is_kept": True}
        bias = layout.unconditional_biases + layer if is_unconditional else 2 * layer + 1
        linear: dict[str, Any] = {"weight": 2 * layer, "bias": bias}
        if is_unconditional or not layout.has_classes:
            steps = [(OperationKind.LINEAR, linear | activation)]
        else:
            steps = [
                (OperationKind.LINEAR, linear),
                (OperationKind.ADD_CONTEXT, {"weight": 2 * layout.num_layers + layer}),
            ]
            steps += [(OperationKind.ACTIVATION, activation)] if is_hidden else []
        for kind, fields in steps:
            operations.append(_operation(kind, order, source, **fields))
            source = num_before + len(operations)
    return operations


def _operation(kind: OperationKind, units: _Units, source: int, **fields: Any) -> MaskedOperation:
    return MaskedOperation(Operation(kind=kind, source=source, **{"weight": -1, "bias": -1, **fields}), units)
