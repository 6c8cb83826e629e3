"""The structures that Python and C++ share, and the checks of what they point to.

C++ trusts every pointer and size. So nothing else makes these structures, and what does not fit is refused here: an
`UnsupportedError` leaves the computation to PyTorch, whose code reports what is wrong.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from jacobiflow.utils.checks import format_value

MAX_INT32 = 2**31 - 1  # largest size or stride that most fields can hold
_HEADER = (Path(__file__).parent / "src" / "boundary.h").read_text()


class UnsupportedError(Exception):
    """Native code does not take this: an activation, say, or a tensor of another shape or dtype."""


class OperationKind(IntEnum):
    """The kind of an operation of a masked network."""

    LINEAR, ACTIVATION, SUM, ADD_CONTEXT, GATE_CONTEXT, EXTRAPOLATION = range(6)


class Activation(IntEnum):
    """An activation."""

    IDENTITY, RELU, LEAKY_RELU, ELU, SELU, TANH, SIGMOID, SILU, GELU, GELU_TANH, SOFTPLUS = range(11)


class TransformKind(IntEnum):
    """The kind of a transform."""

    PERMUTATION, AFFINE, SOFT_CLIPPED_AFFINE, SOFTPLUS_AFFINE, SIGMOID_AFFINE, CLAMPED_AFFINE, LOG_AFFINE = range(7)
    RATIONAL_QUADRATIC, RATIONAL_LINEAR, NORMAL = 7, 8, 9


class SplineBoundary(IntEnum):
    """The derivatives at the ends of a spline: a constant, parameters, or one parameter for both."""

    FIXED, FREE, CIRCULAR = range(3)


class WeightFormat(IntEnum):
    """The stored type of a weight. Each output of an INT16 weight is multiplied by a scale."""

    FLOAT32, FLOAT64, BFLOAT16, FLOAT16, INT16 = range(5)


WEIGHT_FORMATS = {
    torch.float32: WeightFormat.FLOAT32, torch.float64: WeightFormat.FLOAT64, torch.bfloat16: WeightFormat.BFLOAT16,
    torch.float16: WeightFormat.FLOAT16, torch.int16: WeightFormat.INT16,
}  # fmt: skip

_HOOKS_ON_ALL_MODULES = (
    "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks",
)  # fmt: skip
_ENUMERATIONS = (OperationKind, Activation, TransformKind, SplineBoundary, WeightFormat)
_TYPES: dict[str, Any] = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "double": ctypes.c_double}
_TYPES |= {enumeration.__name__: ctypes.c_int32 for enumeration in _ENUMERATIONS}


def _read_fields(structure: str) -> list[tuple[str, Any]]:
    """Returns the fields of a structure of boundary.h, which has one in each line."""
    _, _, rest = _HEADER.partition(f"struct {structure} {{\n")
    declarations = re.findall(r"^  (.+?)(\w+);", rest.partition("\n};")[0], re.MULTILINE)
    return [(name, ctypes.c_void_p if "*" in kind else _TYPES[kind.strip()]) for kind, name in declarations]


class Operation(ctypes.Structure):
    """Computes one value of a masked network."""

    _fields_ = _read_fields("Operation")


class Transform(ctypes.Structure):
    """A transform of a chain."""

    _fields_ = _read_fields("Transform")


class ChainArgs(ctypes.Structure):
    """A call of a chain of transforms."""

    _fields_ = _read_fields("ChainArgs")


class GradientArgs(ctypes.Structure):
    """A call of the backward pass of a chain."""

    _fields_ = _read_fields("GradientArgs")


class Weight(ctypes.Structure):
    """A weight of a dense layer."""

    _fields_ = _read_fields("Weight")


_TYPES["Weight"] = Weight


class LayerArgs(ctypes.Structure):
    """The parameters of a transformer layer."""

    _fields_ = _read_fields("LayerArgs")


class TransformerArgs(ctypes.Structure):
    """The inverse of a block with a causal transformer."""

    _fields_ = _read_fields("TransformerArgs")


# The shape of each parameter of a layer, by its field of `LayerArgs`: c channels, h hidden units, t tokens.
_BASE = {
    "norm": "c", "norm_bias": "c", "qkv": "3c c", "qkv_bias": "3c", "proj": "c c", "proj_bias": "c", "mlp_norm": "c",
    "mlp_norm_bias": "c", "up": "h c", "up_bias": "h", "down": "c h", "down_bias": "c",
}  # fmt: skip
_NORMS = {"query_norm": "c", "query_norm_bias": "c", "key_norm": "c", "key_norm_bias": "c"}
_CONDITION = {"condition": "t c"}
_ADAPTIVE = {
    "scale": "t c", "shift": "t c", "gate": "t c", "gated_scale": "t c", "gated_shift": "t c", "gated_up": "2h c",
    "gated_down": "c h", "gated_gate": "t c",
}  # fmt: skip
_LAYER = _BASE | _NORMS | _CONDITION | _ADAPTIVE
MATRICES = {"qkv", "proj", "up", "down", "gated_up", "gated_down"}


def layer_shapes(
    layers: Sequence[Mapping[str, Tensor]], tokens: int, channels: int, hidden: int
) -> dict[str, tuple[int, ...]]:
    """Returns the shape that each parameter of a layer must have. All layers have the same parameters."""
    names = set(_BASE)
    for group in (_NORMS, _CONDITION, _ADAPTIVE):
        names |= group.keys() if group.keys() <= layers[0].keys() else set()
    if any(layer.keys() != names for layer in layers):
        raise UnsupportedError("layers that lack a parameter, or have another")
    sizes = {"c": channels, "3c": 3 * channels, "h": hidden, "2h": 2 * hidden, "t": tokens}
    return {name: tuple(sizes[size] for size in shape.split()) for name, shape in _LAYER.items() if name in names}


def check_tensor(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns the tensor as contiguous memory. Raises UnsupportedError if its shape or dtype differ."""
    if not is_plain(tensor, dtype) or tensor.shape != shape:
        raise UnsupportedError(f"{format_value(tensor)}, where native code reads {shape} of {dtype}")
    return tensor.detach().contiguous()


def is_traced() -> bool:
    """Returns True if PyTorch traces, compiles, transforms functions, or has a dispatch mode or hooks on all modules.

    It also returns True if PyTorch lacks the private functions that tell.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    try:
        is_observed = torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack()
        is_hooked = any(getattr(nn.modules.module, name) for name in _HOOKS_ON_ALL_MODULES)
        return bool(is_observed or is_hooked) or forward_ad._current_level >= 0
    except AttributeError:
        return True


def is_plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Returns True for a dense tensor of this dtype on a CPU, of PyTorch's own classes."""
    kind = type(tensor)
    return (kind is Tensor or kind is nn.Parameter) and (
        tensor.dtype is dtype and tensor.is_cpu and tensor.layout is torch.strided and not tensor.is_nested
    )


def address_of(tensor: Tensor | None) -> int | None:
    """Returns the address of a tensor's values. Raises UnsupportedError if they are not aligned, or freed."""
    if tensor is None:
        return None
    address = tensor.data_ptr()
    if address % tensor.itemsize or (not address and tensor.numel()):  # FSDP frees them
        raise UnsupportedError("values that are not aligned, or freed")
    return address


def addresses_of(
    tensors: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
) -> ctypes.Array[ctypes.c_void_p]:
    """Returns the addresses of tensors. Raises UnsupportedError if the shape or dtype of one differs.

    It does what `check_tensor` and `address_of` do in one loop, for calls with many tensors and few rows.
    """
    table, size = (ctypes.c_void_p * len(shapes))(), dtype.itemsize
    try:
        for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
            kind = type(tensor)
            if (
                (kind is not nn.Parameter and kind is not Tensor) or tensor.dtype is not dtype or not tensor.is_cpu
                or tensor.shape != shape or not tensor.is_contiguous()
            ):  # fmt: skip
                raise UnsupportedError(f"{format_value(tensor)}, where native code reads {shape} of {dtype}")
            address = tensor.data_ptr()
            if not address or address % size:
                raise UnsupportedError("values that are not aligned, or freed")
            table[i] = address
    except RuntimeError as error:  # The tensor is sparse or nested.
        raise UnsupportedError("a tensor that is not dense") from error
    return table
