"""Tells one set of weights from another."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping, Sequence
from itertools import compress
from operator import attrgetter
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from jacobiflow.checks import check_kind
from jacobiflow.errors import InputValueError


def fingerprint(flow: nn.Module) -> str:
    """SHA-256 over the names, shapes and values of all weights and buffers.

    Values are rounded to bfloat16: it is the same for a flow in float64, float32 and bfloat16, on every device.
    """
    check_kind("flow", flow, nn.Module, "a flow")
    return fingerprint_of(flow.state_dict())


def fingerprint_of(state: Mapping[str, Tensor]) -> str:
    """The `fingerprint` of the flow with this state dict."""
    digest, ordered = hashlib.sha256(), sorted(state.items())
    for name, value in ordered:
        digest.update(f"{name}{tuple(value.shape)}".encode())
    for _, value in ordered:
        digest.update(value.detach().to(torch.bfloat16).contiguous().cpu().view(torch.int16).numpy().data)
    return digest.hexdigest()


def check_fingerprint(expected: str, flow: nn.Module, what: str, remedy: str = "calibrate this one") -> None:
    """**Raises** `ValueError` where `flow` has other weights than those of the fingerprint `expected`."""
    actual = fingerprint(flow)
    if actual != expected:
        raise InputValueError(f"{what} another flow (weights {expected[:12]}, this one's {actual[:12]}): {remedy}")


def cached_fingerprint(flow: nn.Module) -> str:
    """The `fingerprint`, computed anew if the weights seem to have changed since the last call for this flow.

    If they have not, it does not read them, and takes a fraction of a millisecond. It notices:

    - other tensors in the place of weights, as after a move to another device or dtype;
    - every change that PyTorch counts: by optimizers, by `load_state_dict` and by in-place operations;
    - every other change of a tensor's first entry, as by `weight.data.copy_(average)`.

    It does not notice a change through `.data` or NumPy that leaves the first entry of each tensor as it was.
    """
    snapshot, value = _cache.get(flow, (None, ""))
    if snapshot is None or not snapshot.is_current():
        snapshot = _Snapshot(flow)  # before the weights are read: of a change meanwhile the next call knows
        value = fingerprint(flow)
        if snapshot.is_reliable:
            _cache[flow] = snapshot, value
    return value


class _Snapshot:
    """Weights at a moment, as far as they can be told from later ones without being read; see `cached_fingerprint`."""

    def __init__(self, flow: nn.Module) -> None:
        modules = list(flow.modules())
        # Their dicts, since a walk through all modules would take several times as long, and would keep the flow alive.
        self._children = [module._modules for module in modules if module._modules]
        self._places = [place for module in modules for place in (module._parameters, module._buffers) if place]
        self._ids = self._child_ids()
        tensors = self._tensors()
        # Other kinds of tensors need not have memory of their own, nor does PyTorch count changes of all.
        self.is_reliable = not any(
            t.is_inference() or t.layout != torch.strided or (t.is_cpu and type(t) not in (Tensor, nn.Parameter))
            for t in tensors
        )
        if self.is_reliable:
            self._state = _state(tensors)
            self._memory = [
                (ctypes.c_char * t.element_size()).from_address(t.data_ptr())
                for t in tensors
                if t.is_cpu and t.data_ptr()
            ]
            self._elsewhere = [not t.is_cpu and t.numel() > 0 for t in tensors]
            self._values = self._first_entries(tensors)

    def is_current(self) -> bool:
        tensors = self._tensors()
        if self._child_ids() != self._ids or _state(tensors) != self._state:
            return False  # before memory is read, which may be that of others by now
        return self._first_entries(tensors) == self._values

    def _child_ids(self) -> list[int]:
        return [id(child) for children in self._children for child in children.values()]

    def _tensors(self) -> list[Tensor]:
        return [tensor for place in self._places for tensor in place.values() if tensor is not None]

    def _first_entries(self, tensors: Sequence[Tensor]) -> tuple[list[bytes], list[float]]:
        """Of each tensor, read from memory on a CPU, where a slice of each would take several times as long."""
        values: list[float] = []
        if any(self._elsewhere):
            with torch.no_grad():
                values = torch.cat([t.as_strided((1,), (1,)) for t in compress(tensors, self._elsewhere)]).tolist()
        return list(map(attrgetter("raw"), self._memory)), values


def _state(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Addresses of the tensors, and PyTorch's counts of their changes."""
    return list(map(Tensor.data_ptr, tensors)), list(map(attrgetter("_version"), tensors))


_cache: WeakKeyDictionary[nn.Module, tuple[_Snapshot, str]] = WeakKeyDictionary()
