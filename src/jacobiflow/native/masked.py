"""Describes masked autoregressive transforms, and those between them, to native code."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from jacobiflow.native.boundary import (
    Operation,
    OperationKind,
    SplineBoundary,
    Transform,
    TransformKind,
    UnsupportedError,
    address_of,
    is_plain,
)

_Units = tuple[Sequence[int], Sequence[int]]
"""The units of a value, as rows of its weight in the order of the steps; and the number that each step can compute."""


@dataclass(frozen=True)
class ChainTransform:
    """A transform of a chain, whose sizes fit each other.

    Attributes:
        structure: The transform for native code.
        memory: What has to live as long as `structure`.
        shapes: The shapes of its tensors.
        features: D, or `None` if it takes any.
        context: The width of the context that its network takes, or `None` if it has no network.
    """

    structure: Transform
    memory: Any
    shapes: Sequence[tuple[int, ...]] = ()
    features: int | None = None
    context: int | None = None


def permutation_transform(order: Sequence[int]) -> ChainTransform:
    """Returns the transform y_i = x_order[i]."""
    _check(_is_permutation(order, len(order)))
    indices = _integers(order)
    structure = Transform(kind=TransformKind.PERMUTATION, features=len(order), order=ctypes.addressof(indices))
    return ChainTransform(structure, indices, features=len(order))


def affine_transform(scale: tuple[int, ...], shift: tuple[int, ...]) -> ChainTransform:
    """Returns the transform y = scale x + shift, of tensors of these shapes: one number, or one for each feature."""
    sizes = [torch.Size(shape).numel() for shape in (scale, shift)]
    features = max(sizes)
    _check(all(size in (1, features) for size in sizes))
    strides = [int(size > 1) for size in sizes]
    structure = Transform(kind=TransformKind.AFFINE, scale_stride=strides[0], shift_stride=strides[1])
    return ChainTransform(structure, None, (scale, shift), features if features > 1 else None)


def normal_transform(features: int) -> ChainTransform:
    """Returns the transform y = x whose log-determinant is the log-density of N(shift, scale^2) at x.

    At the end of a chain it makes the log-determinant of the whole the log-density of a flow. Its tensors are the scale
    and the shift, of one number for each feature.
    """
    structure = Transform(kind=TransformKind.NORMAL, scale_stride=1, shift_stride=1)
    return ChainTransform(structure, None, ((features,), (features,)), features)


class MaskedOperation(NamedTuple):
    """An operation of a masked network, the units of the value that it makes, and the mask of its weight, on a CPU."""

    operation: Operation
    units: _Units
    mask: Bool[Tensor, "o i"] | None = None


def masked_transform(
    starts: Sequence[int],
    order: Sequence[int],
    operations: Sequence[MaskedOperation],
    inputs: _Units,
    shapes: Sequence[tuple[int, ...]],
    parameters: int,
    context: int = 0,
    own_context: int = 0,
    **settings: Any,
) -> ChainTransform:
    """Returns a transform with a masked network.

    Args:
        starts: The positions in `order` at which each step starts, and D at the end.
        order: The features, sorted by step.
        inputs: The units of the network's input.
        shapes: The shapes of the tensors that operations count.
        parameters: The parameters of each feature.
        context: The number of context columns in the network's input.
        own_context: The width of the context that operations read beside the input.
        settings: Other fields of `Transform`.
    """
    features, steps = len(order), len(starts) - 1
    structure = Transform(
        steps=steps, operation_count=len(operations), features=features, parameters=parameters, context=context,
        **settings,
    )  # fmt: skip
    _check(_is_permutation(order, features) and starts[0] == 0 and starts[-1] == features)
    _check(steps > 0 and all(a < b for a, b in pairwise(starts)))
    _check_parameters(structure)
    _check_network(structure, starts, operations, inputs, shapes, own_context)
    arrays = [tuple(map(_integers, units)) for units in (*(units for _, units, _ in operations), inputs)]
    values = [inputs, *(units for _, units, _ in operations)]
    masks = [
        None if mask is None or _has_all_inputs(mask, units, values[operation.source]) else mask.contiguous()
        for operation, units, mask in operations
    ]
    table = (Operation * len(operations))(*(operation for operation, *_ in operations))
    for operation, (rows, ready), mask in zip(table, arrays, masks, strict=False):
        operation.units, operation.rows, operation.ready = len(rows), ctypes.addressof(rows), ctypes.addressof(ready)
        operation.mask = address_of(mask)
    sorted_features, sorted_starts = _integers(order), _integers(starts)
    structure.operations, structure.order = ctypes.addressof(table), ctypes.addressof(sorted_features)
    structure.starts = ctypes.addressof(sorted_starts)
    structure.input_rows, structure.input_ready = map(ctypes.addressof, arrays[-1])
    memory = (arrays, masks, table, sorted_features, sorted_starts)
    return ChainTransform(structure, memory, shapes, features, context or own_context)


def _check_parameters(t: Transform) -> None:
    """Checks that there are as many parameters for each feature as the kind of transform reads."""
    if t.kind in (TransformKind.RATIONAL_QUADRATIC, TransformKind.RATIONAL_LINEAR):
        derivatives = {
            SplineBoundary.FIXED: t.bins - 1,
            SplineBoundary.FREE: t.bins + 1,
            SplineBoundary.CIRCULAR: t.bins,
        }[SplineBoundary(t.ends)]
        lambdas = t.bins if t.kind == TransformKind.RATIONAL_LINEAR else 0
        _check(t.bins > 0 and t.parameters == 2 * t.bins + derivatives + lambdas)
        _check(max(t.min_width, t.min_height) * t.bins < 1)
        _check(not lambdas or t.ends == SplineBoundary.FIXED)
    else:
        without_network = (TransformKind.PERMUTATION, TransformKind.AFFINE, TransformKind.NORMAL)
        _check(t.kind not in without_network and t.parameters == 2)


def _check_network(
    t: Transform, starts: Sequence[int], operations: Sequence[MaskedOperation], inputs: _Units,
    shapes: Sequence[tuple[int, ...]], own_context: int,
) -> None:  # fmt: skip
    """Checks that each operation reads units and entries of tensors that there are."""
    values = [inputs, *(units for _, units, _ in operations)]
    for rows, ready in values:
        _check(len(ready) == t.steps and min(rows, default=0) >= 0)
        _check(all(a <= b for a, b in pairwise((0, *ready, len(rows)))))
    rows, ready = inputs
    _check(_is_permutation(rows, t.context + t.features) and ready[0] >= t.context)
    _check(all(0 <= row - t.context_start < t.context for row in rows[: t.context]))
    for position, (operation, (rows, ready), mask) in enumerate(operations):
        source, other, kind = operation.source, operation.other, OperationKind(operation.kind)
        _check(0 <= source <= position and 0 <= other <= position)
        if kind == OperationKind.LINEAR:  # it reads all units of a kept value, in the order of the weight's columns
            _check(not source or bool(operations[source - 1].operation.is_kept))
            width = len(values[source][0])
            _check(_is_permutation(values[source][0], width))
        else:  # it reads the same units of its sources
            sources = (source, other) if kind in (OperationKind.SUM, OperationKind.EXTRAPOLATION) else (source,)
            _check(all(list(values[s][1]) == list(ready) and len(values[s][0]) == len(rows) for s in sources))
            width = t.context or own_context
        has_weight = kind in (OperationKind.LINEAR, OperationKind.ADD_CONTEXT, OperationKind.GATE_CONTEXT)
        _check((operation.weight >= 0) == has_weight and (kind != OperationKind.EXTRAPOLATION or operation.bias >= 0))
        _check(max(operation.weight, operation.bias) < len(shapes))
        if has_weight:
            shape = shapes[operation.weight]
            _check(len(shape) == 2 and shape[1] == width and _is_permutation(rows, shape[0]))
            _check(mask is None or (is_plain(mask, torch.bool) and mask.shape == shape))
            _check(operation.bias < 0 or shapes[operation.bias] == shape[:1])
        elif operation.bias >= 0:
            _check(torch.Size(shapes[operation.bias]).numel() == len(rows))
    last, (rows, ready), _ = operations[-1]
    _check(not last.is_kept and len(rows) == t.features * t.parameters)
    _check(list(ready) == [start * t.parameters for start in starts[1:]])


def _has_all_inputs(mask: Bool[Tensor, "o i"], units: _Units, inputs: _Units) -> bool:
    """True if each unit reads all inputs that its step can read, so that the steps say what the mask does."""
    rows, ready = units
    reads, unit = torch.zeros(len(rows), 1, dtype=torch.int64), 0
    for last, read in zip(ready, inputs[1], strict=True):
        reads[unit:last] = read
        unit = last
    return bool((mask[list(rows)][:, list(inputs[0])] | (torch.arange(mask.shape[1]) >= reads)).all())


def _check(condition: bool) -> None:
    if not condition:
        raise UnsupportedError("sizes that do not fit each other")


def _is_permutation(order: Sequence[int], size: int) -> bool:
    return sorted(order) == list(range(size))


def _integers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int32]:
    return (ctypes.c_int32 * len(values))(*values)
