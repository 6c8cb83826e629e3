"""Calls of masked.cpp, which computes chains of masked autoregressive transforms."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jacobiflow.native.build import library


class Kind(IntEnum):
    """The kind of an operation, see masked.cpp."""

    LINEAR, ACTIVATION, SUM, ADD_CONTEXT, GATE_CONTEXT, EXTRAPOLATION = range(6)


class Function(IntEnum):
    """An activation."""

    IDENTITY, RELU, LEAKY_RELU, ELU, SELU, TANH, SIGMOID, SILU, GELU, GELU_TANH, SOFTPLUS = range(11)


class Elementwise(IntEnum):
    """The transform of each feature, or a transform without a network."""

    PERMUTATION, AFFINE, SOFT_CLIPPED_AFFINE, SOFTPLUS_AFFINE, SIGMOID_AFFINE, CLAMPED_AFFINE, LOG_AFFINE = range(7)
    RATIONAL_QUADRATIC, RATIONAL_LINEAR = 7, 8


class Ends(IntEnum):
    """The derivatives at the ends of a spline: a fixed number, parameters, or one parameter for both."""

    FIXED, FREE, CIRCULAR = range(3)


class Operation(ctypes.Structure):
    """`Operation` of masked.cpp."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in (
            "kind", "source", "other", "units", "weight", "bias", "function", "is_kept",
        )),
        *((name, ctypes.c_double) for name in ("first", "second")),
        *((name, ctypes.c_void_p) for name in ("mask", "rows", "ready")),
    )  # fmt: skip


class Transform(ctypes.Structure):
    """`Transform` of masked.cpp."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in (
            "kind", "features", "steps", "parameters", "operation_count", "context", "context_start", "first_tensor",
            "scale_stride", "shift_stride", "bins", "ends", "is_soft_clipped", "has_tails", "is_circular",
            "is_reversed",
        )),
        *((name, ctypes.c_double) for name in (
            "first", "second", "low", "high", "min_width", "min_height", "min_slope", "end_slope", "factor",
            "gap", "clip",
        )),
        *((name, ctypes.c_void_p) for name in ("operations", "order", "starts", "input_rows", "input_ready")),
    )  # fmt: skip


class Call(ctypes.Structure):
    """`Call` of masked.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "transforms", "tensors", "input", "context", "out", "log_det", "failed",
        )),
        *((name, ctypes.c_int64) for name in ("rows", "in_stride", "context_stride")),
        *((name, ctypes.c_int32) for name in (
            "count", "features", "context_features", "is_inverse", "is_by_feature", "threads",
        )),
    )  # fmt: skip


def permutation(order: Sequence[int]) -> tuple[Transform, Any]:
    """Returns the transform y_i = x_order[i] and memory that has to live as long as it."""
    indices = _integers(order)
    return Transform(kind=Elementwise.PERMUTATION, features=len(order), order=ctypes.addressof(indices)), indices


def masked_transform(
    starts: Sequence[int],
    order: Sequence[int],
    operations: Sequence[tuple[Operation, Sequence[int], Sequence[int]]],
    inputs: tuple[Sequence[int], Sequence[int]],
    **settings: Any,
) -> tuple[Transform, Any]:
    """Returns a transform with a masked network and memory that has to live as long as it.

    Args:
        starts: The positions in `order` at which each step starts, and D at the end.
        order: The features, sorted by step.
        operations: Each with its `rows` and `ready`, see masked.cpp.
        inputs: `rows` and `ready` of the network's input.
        settings: Other fields of `Transform`.
    """
    arrays = [(_integers(rows), _integers(ready)) for _, rows, ready in (*operations, (None, *inputs))]
    table = (Operation * len(operations))(*(operation for operation, _, _ in operations))
    for operation, (rows, ready) in zip(table, arrays, strict=False):
        operation.units, operation.rows, operation.ready = len(rows), ctypes.addressof(rows), ctypes.addressof(ready)
    sorted_features, sorted_starts = _integers(order), _integers(starts)
    transform = Transform(
        steps=len(starts) - 1, operation_count=len(operations), operations=ctypes.addressof(table),
        order=ctypes.addressof(sorted_features), starts=ctypes.addressof(sorted_starts),
        input_rows=ctypes.addressof(arrays[-1][0]), input_ready=ctypes.addressof(arrays[-1][1]), **settings,
    )  # fmt: skip
    return transform, (arrays, table, sorted_features, sorted_starts)


def _integers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int32]:
    return (ctypes.c_int32 * len(values))(*values)


class Result(NamedTuple):
    """Rows of a chain; `failed` are those that are not finite or overflowed on the way, `None` if no row did."""

    values: Float[Tensor, "b d"]
    log_det: Float[Tensor, "*bd"] | None
    failed: Bool[Tensor, " b"] | None


def run_chain(
    transforms: ctypes.Array[Transform],
    pointers: Sequence[int],
    x: Float[Tensor, "b d"],
    context: Float[Tensor, "#b c"] | None,
    is_inverse: bool,
    log_det: str | None,
) -> Result | None:
    """Computes a chain of transforms or its inverse; `None` if there is no library, or no memory or threads.

    Args:
        transforms: In the order of the forward direction.
        pointers: Addresses of their tensors: in memory one row after the other, of the dtype of `x`.
        x: Rows, float32 or float64, on a CPU.
        context: A row for each row of `x`, or one for all.
        is_inverse: Whether to invert.
        log_det: "rows" for the sum over features, "features" for each feature of a single transform, or `None`.
    """
    native = library()
    if native is None:
        return None
    rows, features = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    if context is not None and context.stride(1) != 1:
        context = context.contiguous()
    out, failed = x.new_empty(rows, features), x.new_empty(rows, dtype=torch.bool)
    log_dets = None
    if log_det is not None:
        log_dets = x.new_empty((rows, features) if log_det == "features" else (rows,))
    table = (ctypes.c_void_p * len(pointers))(*pointers)
    call = Call(
        ctypes.addressof(transforms), ctypes.addressof(table), x.data_ptr(),
        None if context is None else context.data_ptr(), out.data_ptr(),
        None if log_dets is None else log_dets.data_ptr(), failed.data_ptr(), rows, x.stride(0),
        0 if context is None or len(context) == 1 else context.stride(0), len(transforms), features,
        0 if context is None else context.shape[1], is_inverse, log_det == "features", torch.get_num_threads(),
    )  # fmt: skip
    count = native.jacobiflow_masked(ctypes.byref(call), x.dtype is torch.float64)
    return None if count < 0 else Result(out, log_dets, failed if count else None)
