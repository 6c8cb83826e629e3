"""Checks of what native code reads: tensors, their shapes, and their addresses.

C++ trusts every pointer and size. So what does not fit is refused here: an `UnsupportedError` leaves the computation to
PyTorch, whose code reports what is wrong.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from jacobiflow.errors import UnsupportedError
from jacobiflow.native.boundary import WeightFormat
from jacobiflow.utils.checks import format_value

MAX_INT32 = 2**31 - 1  # largest size or stride that most fields can hold
WEIGHT_FORMATS = {
    torch.float32: WeightFormat.FLOAT32, torch.float64: WeightFormat.FLOAT64, torch.bfloat16: WeightFormat.BFLOAT16,
    torch.float16: WeightFormat.FLOAT16,
}  # fmt: skip
_PLAIN = frozenset((Tensor, nn.Parameter))

# The shape of each parameter of a layer, by its field of `LayerArgs`: c width, h hidden units, t tokens.
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
    layers: Sequence[Mapping[str, Tensor]], tokens: int, width: int, hidden: int
) -> dict[str, tuple[int, ...]]:
    """Returns the shape that each parameter of a layer must have. All layers have the same parameters."""
    names = set(_BASE)
    for group in (_NORMS, _CONDITION, _ADAPTIVE):
        names |= group.keys() if group.keys() <= layers[0].keys() else set()
    if any(layer.keys() != names for layer in layers):
        raise UnsupportedError("layers that lack a parameter, or have another")
    sizes = {"c": width, "3c": 3 * width, "h": hidden, "2h": 2 * hidden, "t": tokens}
    return {name: tuple(sizes[size] for size in shape.split()) for name, shape in _LAYER.items() if name in names}


def check_tensor(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Returns the tensor as contiguous memory. Raises UnsupportedError if its shape or dtype differ."""
    if not is_plain(tensor, dtype) or tensor.shape != shape:
        raise UnsupportedError(f"{format_value(tensor)}, where native code reads {shape} of {dtype}")
    return tensor.detach().contiguous()


def allocate(dtype: torch.dtype, *shape: int) -> Tensor:
    """Returns memory for C++, without values. It is on the CPU, whatever PyTorch's default device is."""
    return torch.empty(*(shape or [()]), dtype=dtype, device="cpu")  # Sizes one by one take less time than a tuple.


def is_traced() -> bool:
    """Returns True if PyTorch traces, compiles, transforms functions, or has a dispatch mode or hooks on all modules.

    It also returns True if PyTorch lacks the private functions that tell.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    try:
        is_observed = torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack()
        is_hooked = nn.modules.module._has_any_global_hook()
        return bool(is_observed or is_hooked) or forward_ad._current_level >= 0
    except AttributeError:
        return True


def check_untraced() -> None:
    """Raises UnsupportedError if `is_traced`."""
    if is_traced():
        raise UnsupportedError("PyTorch traced or transformed the call, or all modules had hooks")


def check_autocast() -> None:
    """Raises UnsupportedError under `torch.autocast`, as native code computes in the dtype of its inputs."""
    if torch.is_autocast_enabled("cpu"):
        raise UnsupportedError("torch.autocast was enabled (call it outside of autocast)")


def is_plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Returns True for a dense tensor of this dtype on a CPU, of PyTorch's own classes."""
    return type(tensor) in _PLAIN and (
        tensor.dtype is dtype and tensor.layout is torch.strided and tensor.is_cpu and not tensor.is_nested
        and not tensor.is_neg()
    )  # fmt: skip


def address_of(tensor: Tensor | None) -> int | None:
    """Returns the address of a tensor's values. Raises UnsupportedError if they are not aligned, or freed."""
    if tensor is None:
        return None
    address = tensor.data_ptr()
    if address % tensor.itemsize or (not address and tensor.numel()):  # FSDP frees them
        raise UnsupportedError("values that are not aligned, or freed")
    return address


def addresses_of(
    tensors: Sequence[Tensor], shapes: list[tuple[int, ...]], dtype: torch.dtype, previous: array[int] | None = None
) -> array[int]:
    """Returns the addresses of tensors. Raises UnsupportedError if one of them does not fit.

    It checks what `check_tensor` and `address_of` check, for calls with many tensors and few rows. If all addresses are
    those that the `previous` call for this dtype returned, their device, alignment and sign are not checked again.
    """
    try:
        fits = (
            _PLAIN.issuperset(map(type, tensors)) and [tensor.shape for tensor in tensors] == shapes
            and {tensor.dtype for tensor in tensors} <= {dtype} and all(map(Tensor.is_contiguous, tensors))
        )  # fmt: skip
    except RuntimeError:  # A tensor is sparse or nested.
        fits = False
    addresses, size = array("Q", map(Tensor.data_ptr, tensors) if fits else ()), dtype.itemsize
    if fits and addresses != previous:
        fits = all(tensor.is_cpu and not tensor.is_neg() for tensor in tensors)
        fits = fits and all(
            (address or not tensor.numel()) and not address % size
            for tensor, address in zip(tensors, addresses, strict=True)
        )
    if not fits:
        raise UnsupportedError(f"tensors that are not of {dtype} on a CPU, of other shapes, not aligned, or freed")
    return addresses
