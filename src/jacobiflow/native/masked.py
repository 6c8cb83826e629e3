"""Masked autoregressive transforms in native code: their description, and calls of a chain of them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jacobiflow.native.build import library
from jacobiflow.native.structures import Call, Elementwise, Operation, Transform


def integers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int32]:
    """An array of C."""
    return (ctypes.c_int32 * len(values))(*values)


def permutation(order: Sequence[int]) -> tuple[Transform, Any]:
    """The transform y_i = x_order[i], and what must live as long as it is used."""
    indices = integers(order)
    return Transform(kind=Elementwise.PERMUTATION, features=len(order), order=ctypes.addressof(indices)), indices


def masked_transform(
    starts: Sequence[int],
    order: Sequence[int],
    operations: Sequence[tuple[Operation, Sequence[int], Sequence[int]]],
    inputs: tuple[Sequence[int], Sequence[int]],
    **settings: Any,
) -> tuple[Transform, Any]:
    """A transform with a masked network, and what must live as long as it is used.

    Args:
        starts: For each step, where its features start in `order`, and D at the end.
        order: The features, sorted by the step that solves them.
        operations: Each with its `rows` and `known`, see masked.cpp.
        inputs: The same two of the network's input.
        settings: Other fields of `Transform`.
    """
    arrays = [(integers(rows), integers(known)) for _, rows, known in (*operations, (None, *inputs))]
    table = (Operation * len(operations))(*(operation for operation, _, _ in operations))
    for operation, (rows, known) in zip(table, arrays, strict=False):
        operation.rows, operation.known = ctypes.addressof(rows), ctypes.addressof(known)
    sorted_features, sorted_starts = integers(order), integers(starts)
    transform = Transform(
        steps=len(starts) - 1, operation_count=len(operations), operations=ctypes.addressof(table),
        order=ctypes.addressof(sorted_features), starts=ctypes.addressof(sorted_starts),
        input_rows=ctypes.addressof(arrays[-1][0]), input_known=ctypes.addressof(arrays[-1][1]), **settings,
    )  # fmt: skip
    return transform, (arrays, table, sorted_features, sorted_starts)


@dataclass(frozen=True)
class Result:
    """Of a chain.

    Attributes:
        values: The rows.
        log_det: Logarithm of the determinant of the Jacobian (B,), or of the derivative of each feature (B, D).
        failed: The rows that are not finite, or that overflowed on the way; `None` if there are none.
    """

    values: Float[Tensor, "b d"]
    log_det: Float[Tensor, b * d] | None
    failed: Bool[Tensor, " b"] | None


def run_chain(
    transforms: ctypes.Array[Transform],
    pointers: Sequence[int],
    x: Float[Tensor, "b d"],
    context: Float[Tensor, "#b c"] | None,
    is_inverse: bool,
    log_det: str | None,
) -> Result | None:
    """Values of a chain of transforms, or of its inverse; `None` if there is no library, no memory, or no threads.

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
