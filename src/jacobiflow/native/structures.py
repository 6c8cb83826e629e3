"""The structures of masked.cpp in ctypes."""

from __future__ import annotations

import ctypes
from enum import IntEnum


class Kind(IntEnum):
    """The kind of an operation, see masked.cpp."""

    LINEAR, ACTIVATION, SUM, ADD_CONTEXT, GATE_CONTEXT, EXTRAPOLATION = range(6)


class Function(IntEnum):
    """An activation."""

    IDENTITY, RELU, LEAKY_RELU, ELU, SELU, TANH, SIGMOID, SILU, GELU, GELU_TANH, SOFTPLUS = range(11)


class Elementwise(IntEnum):
    """The transform of each feature, or a transform without a network."""

    PERMUTATION, AFFINE = range(2)
    SOFT_CLIPPED_AFFINE, SOFTPLUS_AFFINE, SIGMOID_AFFINE, CLAMPED_AFFINE, LOG_AFFINE = range(2, 7)
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


STRUCTURES = {"operation": Operation, "transform": Transform, "call": Call}
