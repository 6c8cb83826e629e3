"""Which tensors the native recurrences take, and how."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from jacobiflow.native.build import library


def usable(*tensors: Tensor) -> ctypes.CDLL | None:
    """The library, if it can compute with these: plain, float32, on a CPU, without autocast; else `None`.

    A subclass of `Tensor` may keep its numbers elsewhere than at its address, or have products of its own.
    """
    plain = all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
    if not plain or any(tensor.dtype != torch.float32 or tensor.device.type != "cpu" for tensor in tensors):
        return None
    return None if torch.is_autocast_enabled("cpu") else library()


def pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """An array of the tensors' addresses; they must live as long as it is used."""
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
