"""Descriptions of masked autoregressive transforms, and of the transforms between them, for native code."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from jacobiflow.errors import UnsupportedError
from jacobiflow.native.boundary import (
    Operation,
    OperationKind,
    SplineBoundary,
    Transform,
    TransformKind,
)
from jacobiflow.native.tensors import address_of, is_plain

_Units = tuple[Sequence[int], Sequence[int]]
"""The units of a value, as rows of its weight in the order of the steps; and how many are computed by each step."""


@dataclass(frozen=True)
class ChainTransform:
    """A transform of a chain, whose sizes fit each other.

    Attributes:
        structure: The transform for native code.
        memory: What `structure` points to.
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
    and the shift, with one number for each feature.
    """
    structure = Transform(kind=TransformKind.NORMAL, scale_stride=1, shift_stride=1)
    return ChainTransform(structure, None, ((features,), (features,)), features)


class MaskedOperation(NamedTuple):
    """An operation of a masked network, the units of the value that it makes, and the mask of its weight, on a CPU."""

    operation: Operation
    units: _Units
    mask: Bool[Tensor, "o i"] | None = None


class Steps(NamedTuple):
    """The steps in which a transform is inverted.

    Attributes:
        features: The features, sorted by step.
        starts: The positions in `features` at which each step starts, and D at the end.
        inputs: The units of the network's input.
    """

    features: Sequence[int]
    starts: Sequence[int]
    inputs: _Units


def masked_transform(
    steps: Steps,
    operations: Sequence[MaskedOperation],
    shapes: Sequence[tuple[int, ...]],
    parameters: int,
    context: int = 0,
    own_context: int = 0,
    **settings: Any,
) -> ChainTransform:
    """Returns a transform with a masked network.

    Args:
        shapes: The shapes of the tensors that operations count.
        parameters: The number of parameters of each feature.
        context: The number of context columns in the network's input.
        own_context: The width of the context that operations read beside the input.
        settings: Other fields of `Transform`.
    """
    features, (rows, ready) = len(steps.features), map(_integers, steps.inputs)
    order, starts = _integers(steps.features), _integers(steps.starts)
    structure = Transform(
        steps=len(steps.starts) - 1, num_operations=len(operations), features=features, parameters=parameters,
        context=context, order=ctypes.addressof(order), starts=ctypes.addressof(starts),
        input_rows=ctypes.addressof(rows), input_ready=ctypes.addressof(ready), **settings,
    )  # fmt: skip
    _check_steps(steps)
    _check_parameters(structure)
    _check_network(structure, steps, operations, shapes, own_context)
    memory: list[Any] = [order, starts, rows, ready]
    table = (Operation * len(operations))()
    values = [steps.inputs, *(units for _, units, _ in operations)]
    for i, (operation, units, mask) in enumerate(operations):
        rows, ready = map(_integers, units)
        mask = None if mask is None or _has_all_inputs(mask, units, values[operation.source]) else mask.contiguous()
        table[i] = operation
        table[i].units, table[i].mask = len(rows), address_of(mask)
        table[i].rows, table[i].ready = ctypes.addressof(rows), ctypes.addressof(ready)
        memory += [rows, ready, mask]
    structure.operations = ctypes.addressof(table)
    return ChainTransform(structure, (table, memory), shapes, features, context or own_context)


def _check_steps(steps: Steps) -> None:
    features, starts, _ = steps
    _check(_is_permutation(features, len(features)) and starts[0] == 0 and starts[-1] == len(features))
    _check(len(starts) > 1 and all(a < b for a, b in pairwise(starts)))


def _check_parameters(t: Transform) -> None:
    """Checks that each feature has as many parameters as the kind of transform reads."""
    if t.kind in (TransformKind.RATIONAL_QUADRATIC, TransformKind.RATIONAL_LINEAR):
        derivatives = {
            SplineBoundary.FIXED: t.bins - 1,
            SplineBoundary.FREE: t.bins + 1,
            SplineBoundary.CIRCULAR: t.bins,
        }[SplineBoundary(t.boundary)]
        lambdas = t.bins if t.kind == TransformKind.RATIONAL_LINEAR else 0
        _check(t.bins > 0 and t.parameters == 2 * t.bins + derivatives + lambdas)
        _check(max(t.min_width, t.min_height) * t.bins < 1)
        _check(not lambdas or t.boundary == SplineBoundary.FIXED)
    else:
        without_network = (TransformKind.PERMUTATION, TransformKind.AFFINE, TransformKind.NORMAL)
        _check(t.kind not in without_network and t.parameters == 2)


def _check_network(
    t: Transform, steps: Steps, operations: Sequence[MaskedOperation], shapes: Sequence[tuple[int, ...]],
    own_context: int,
) -> None:  # fmt: skip
    """Checks that each operation reads units and tensor entries that exist."""
    values = [steps.inputs, *(units for _, units, _ in operations)]
    for rows, ready in values:
        _check(len(ready) == t.steps and min(rows, default=0) >= 0)
        _check(all(a <= b for a, b in pairwise((0, *ready, len(rows)))))
    rows, ready = steps.inputs
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
    _check(list(ready) == [start * t.parameters for start in steps.starts[1:]])


def _has_all_inputs(mask: Bool[Tensor, "o i"], units: _Units, inputs: _Units) -> bool:
    """Returns True if each unit reads all inputs of its step, so that no mask is needed."""
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
