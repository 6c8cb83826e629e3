"""The boundary between Python and C++: its structures, the checks of what they point to, and the calls of the library.

C++ trusts every pointer and size. So nothing else calls the library, and what does not fit is refused here: an
`UnsupportedError` leaves the computation to PyTorch, whose code reports what is wrong.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from jacobiflow.utils.checks import format_value

MAX_INT32 = 2**31 - 1  # of most sizes and strides in C++


class UnsupportedError(Exception):
    """Native code does not take this: an activation, say, or a tensor of another shape or dtype."""


class OperationKind(IntEnum):
    """The kind of an operation."""

    LINEAR, ACTIVATION, SUM, ADD_CONTEXT, GATE_CONTEXT, EXTRAPOLATION = range(6)


class Activation(IntEnum):
    """An activation."""

    IDENTITY, RELU, LEAKY_RELU, ELU, SELU, TANH, SIGMOID, SILU, GELU, GELU_TANH, SOFTPLUS = range(11)


class TransformKind(IntEnum):
    """The transform of each feature, or a transform without a network."""

    PERMUTATION, AFFINE, SOFT_CLIPPED_AFFINE, SOFTPLUS_AFFINE, SIGMOID_AFFINE, CLAMPED_AFFINE, LOG_AFFINE = range(7)
    RATIONAL_QUADRATIC, RATIONAL_LINEAR, NORMAL = 7, 8, 9


class SplineBoundary(IntEnum):
    """The derivatives at the ends of a spline: a fixed number, parameters, or one parameter for both."""

    FIXED, FREE, CIRCULAR = range(3)


def _fields(kind: Any, names: str) -> Iterator[tuple[str, Any]]:
    return ((name, kind) for name in names.split())


class Operation(ctypes.Structure):
    """`Operation` of boundary.h."""

    _fields_ = (
        *_fields(ctypes.c_int32, "kind source other units weight bias function is_kept"),
        *_fields(ctypes.c_double, "first second"),
        *_fields(ctypes.c_void_p, "mask rows ready"),
    )


class Transform(ctypes.Structure):
    """`Transform` of boundary.h."""

    _fields_ = (
        *_fields(ctypes.c_int32, "kind features steps parameters operation_count context context_start first_tensor"),
        *_fields(ctypes.c_int32, "scale_stride shift_stride bins ends is_soft_clipped has_tails is_circular"),
        *_fields(ctypes.c_int32, "is_reversed"),
        *_fields(ctypes.c_double, "first second low high min_width min_height min_slope end_slope factor gap clip"),
        *_fields(ctypes.c_void_p, "operations order starts input_rows input_ready"),
    )


class ChainArgs(ctypes.Structure):
    """`ChainArgs` of boundary.h."""

    _fields_ = (
        *_fields(ctypes.c_void_p, "transforms tensors input context out log_det failed packed activations"),
        *_fields(ctypes.c_int64, "rows in_stride context_stride"),
        *_fields(ctypes.c_int32, "count features context_features is_inverse is_by_feature threads"),
    )


class GradientArgs(ctypes.Structure):
    """`GradientArgs` of boundary.h."""

    _fields_ = tuple(_fields(ctypes.c_void_p, "chain grad_out grad_log_det grad_tensors grad_input grad_context"))


class WeightFormat(IntEnum):
    """How the numbers of a weight are stored; those of INT16 are multiplied by a scale for each output."""

    FLOAT32, FLOAT64, BFLOAT16, FLOAT16, INT16 = range(5)


_FORMATS = {
    torch.float32: WeightFormat.FLOAT32, torch.float64: WeightFormat.FLOAT64, torch.bfloat16: WeightFormat.BFLOAT16,
    torch.float16: WeightFormat.FLOAT16, torch.int16: WeightFormat.INT16,
}  # fmt: skip


class Weight(ctypes.Structure):
    """`Weight` of boundary.h."""

    _fields_ = (*_fields(ctypes.c_void_p, "values scales"), *_fields(ctypes.c_int32, "format is_packed"))


# The shape of each parameter of a layer, a field of `LayerArgs`: c channels, h hidden units, t tokens.
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
_LAYER = {name: shape.split() for name, shape in (_BASE | _NORMS | _CONDITION | _ADAPTIVE).items()}
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
    return {name: tuple(sizes[size] for size in shape) for name, shape in _LAYER.items() if name in names}


class LayerArgs(ctypes.Structure):
    """`LayerArgs` of boundary.h."""

    _fields_ = tuple((name, Weight if name in MATRICES else ctypes.c_void_p) for name in _LAYER)


class RecurrenceArgs(ctypes.Structure):
    """`RecurrenceArgs` of boundary.h."""

    _fields_ = (
        *_fields(ctypes.c_void_p, "z position context query_scale"),
        *_fields(Weight, "proj_in proj_out"),
        *_fields(ctypes.c_void_p, "out_bias weight_scale weight_shift prefix_keys_values prefix_hidden rotation"),
        *_fields(ctypes.c_void_p, "final_norm layers x keys_values log_det"),
        *_fields(ctypes.c_int32, "samples networks tokens values channels hidden heads depth scales context_row"),
        *_fields(ctypes.c_int32, "context_token prefix by_density threads teams start stop"),
        ("soft_clip", ctypes.c_double),
    )


class Library:
    """The compiled library in a file. Raises OSError if it cannot be loaded, or is of another version.

    Attributes:
        lanes: The number of float32 in a vector of its processor.
        has_fast_halves: Reading weights in 16-bit floating-point dtypes takes no longer than in float32.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._native = path, ctypes.CDLL(str(path))
        _check_version(self._native, path)
        number, address = ctypes.c_int32, ctypes.c_void_p
        self._native.jacobiflow_pack.argtypes = (address, number, number, number, address, number)
        self._native.jacobiflow_recurrence.argtypes = (address, number)
        for function in (self._native.jacobiflow_masked, self._native.jacobiflow_masked_gradients):
            function.argtypes, function.restype = (address, number), ctypes.c_int64
        self._native.jacobiflow_masked_sizes.argtypes = (address, address)
        self.lanes: int = self._native.jacobiflow_lanes()
        self.has_fast_halves = self.lanes > 4 or platform.machine() in ("aarch64", "arm64")
        self._use_threads_of_pytorch()

    def padded(self, size: int, dtype: torch.dtype) -> int:
        """Returns the size rounded up to whole vectors of a dtype."""
        count = 4 * self.lanes // dtype.itemsize
        return -(-size // count) * count

    def pad(self, values: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns values of this shape with zeros that make whole vectors of the last dimension."""
        return F.pad(require(values, shape, dtype), (0, self.padded(shape[-1], dtype) - shape[-1])).contiguous()

    def weight(
        self, matrix: Tensor, shape: tuple[int, ...], dtype: torch.dtype, scales: Tensor | None, in_panels: bool
    ) -> tuple[Weight, list[Tensor | None]]:
        """Returns a weight for sums in `dtype`, and the tensors that it points to; panels are a copy."""
        if matrix.dtype not in _FORMATS or torch.promote_types(matrix.dtype, torch.float32) != dtype:
            raise UnsupportedError(f"a weight of {matrix.dtype} for sums in {dtype}")
        matrix = require(matrix, shape, matrix.dtype)
        if in_panels:
            matrix = self._pack(matrix)
        scales = None if scales is None else self.pad(scales, shape[:1], torch.float32)
        weight = Weight(address_of(matrix), address_of(scales), _FORMATS[matrix.dtype], in_panels)
        return weight, [matrix, scales]

    def _pack(self, weight: Tensor) -> Tensor:
        """Returns a weight in panels of columns."""
        (outputs, inputs), threads = weight.shape, torch.get_num_threads()
        out = weight.new_empty(self.padded(outputs, torch.promote_types(weight.dtype, torch.float32)), inputs)
        arguments = (address_of(weight), outputs, inputs, _FORMATS[weight.dtype], address_of(out))
        if self._native.jacobiflow_pack(*arguments, threads):  # so many threads are not available
            self._native.jacobiflow_pack(*arguments, 1)
        return out

    def solve_recurrence(self, arguments: RecurrenceArgs, dtype: torch.dtype) -> bool:
        """Solves entries `start` to `stop` - 1; returns False if out of memory or threads."""
        return not self._native.jacobiflow_recurrence(ctypes.byref(arguments), dtype is torch.float64)

    def evaluate_chain(self, arguments: ChainArgs, dtype: torch.dtype) -> int:
        """Computes a chain of transforms; returns the number of failed rows, below 0 if out of memory or threads."""
        return self._native.jacobiflow_masked(ctypes.byref(arguments), dtype is torch.float64)

    def differentiate_chain(self, arguments: GradientArgs, dtype: torch.dtype) -> bool:
        """Computes the gradients of a chain; returns False if out of memory or threads."""
        return not self._native.jacobiflow_masked_gradients(ctypes.byref(arguments), dtype is torch.float64)

    def chain_sizes(self, arguments: ChainArgs) -> tuple[int, int]:
        """Returns how many numbers a chain's packed weights have, and its activations for each row."""
        sizes = (ctypes.c_int64 * 2)()
        self._native.jacobiflow_masked_sizes(ctypes.byref(arguments), sizes)
        return sizes[0], sizes[1]

    def _use_threads_of_pytorch(self) -> None:
        """Gives the library the OpenMP functions that PyTorch has loaded, if it has any."""
        if platform.system() == "Linux":
            pytorch = ctypes.CDLL(torch._C.__file__)  # functions of the libraries that it needs are found in it too
            names = ("GOMP_parallel", "omp_get_num_threads", "omp_get_thread_num")
            with suppress(AttributeError):
                addresses = [ctypes.cast(getattr(pytorch, name), ctypes.c_void_p) for name in names]
                self._native.jacobiflow_use_openmp((ctypes.c_void_p * len(names))(*addresses))


class _Entry(ctypes.Structure):
    """`Entry` of boundary.cpp."""

    _fields_ = (("name", ctypes.c_char_p), ("value", ctypes.c_int64))


def _check_version(native: ctypes.CDLL, path: Path) -> None:
    """Compares structures and enumerations with those of the library; raises OSError if one differs."""
    expected: dict[str, int] = {}
    for structure in (Operation, Transform, ChainArgs, GradientArgs, Weight, LayerArgs, RecurrenceArgs):
        expected[structure.__name__] = ctypes.sizeof(structure)
        names = [name for name, *_ in structure._fields_]
        expected |= {f"{structure.__name__}.{name}": getattr(structure, name).offset for name in names}
    for enumeration in (OperationKind, Activation, TransformKind, SplineBoundary, WeightFormat):
        expected |= {f"{enumeration.__name__}.{member.name.lower()}": member.value for member in enumeration}
    entries: dict[str, int] = {}
    with suppress(AttributeError):
        native.jacobiflow_layout.restype = ctypes.POINTER(_Entry)
        for entry in native.jacobiflow_layout():
            if entry.name is None:
                break
            entries[entry.name.decode()] = entry.value
    if entries != expected:
        name = next(iter(dict(set(entries.items()) ^ set(expected.items()))))
        raise OSError(f"{path}: a library of another version, whose {name} differs")


def require(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns the tensor, or a copy, row after row in memory; raises UnsupportedError if shape or dtype differ."""
    if not is_plain(tensor, dtype) or tensor.shape != shape:
        raise UnsupportedError(f"{format_value(tensor)}, where native code reads {shape} of {dtype}")
    return tensor.detach().contiguous()


def is_traced() -> bool:
    """Returns True if PyTorch does more than compute values, or lacks the private names that tell.

    It may trace, compile, export, transform a function, differentiate forward, or have a dispatch mode or hooks on all
    modules.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    try:
        is_observed = torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack()
        is_hooked = nn.modules.module._has_any_global_hook()
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
    """Returns the addresses of tensors of these shapes and this dtype; raises UnsupportedError if one differs.

    It checks what `require` and `address_of` do, in one loop: many tensors cross with few rows.
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
    except RuntimeError as error:  # of a sparse or nested tensor
        raise UnsupportedError("a tensor that is not dense") from error
    return table
