"""Fingerprints of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import chain
from operator import attrgetter, is_
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from jacobiflow.errors import InputValueError


def fingerprint(flow: nn.Module | Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of the names, shapes and values of all weights and buffers of a flow, or of its state dict.

    Values are rounded to bfloat16: it is the same for a flow in float64, float32 and bfloat16, on every device.
    """
    state = flow.state_dict() if isinstance(flow, nn.Module) else flow
    digest, entries = hashlib.sha256(), sorted(state.items())
    for name, value in entries:
        digest.update(f"{name}{tuple(value.shape)}".encode())
    for _, value in entries:
        digest.update(value.detach().to(torch.bfloat16).contiguous().cpu().view(torch.int16).numpy().data)
    return digest.hexdigest()


def check_fingerprint(expected: str, flow: nn.Module, what: str, remedy: str = "calibrate this one") -> None:
    """Raises ValueError if `flow` has other weights than those of the fingerprint `expected`."""
    actual = fingerprint(flow)
    if actual != expected:
        raise InputValueError(f"{what} another flow (weights {expected[:12]}, this one's {actual[:12]}): {remedy}")


def cached_fingerprint(flow: Any) -> str:
    """Returns the `fingerprint` of a flow, computed again only if a tensor was replaced or changed since the last call.

    PyTorch counts changes by optimizers, `load_state_dict` and in-place operations, not those through `.data` or NumPy.
    """
    cached = _cache.get(flow.blocks)  # The views of a flow share its blocks.
    try:
        if cached is None or not cached.is_current():
            cached = _cache[flow.blocks] = _Snapshot(flow)
    except RuntimeError:  # PyTorch counts no changes of tensors that were made in inference mode.
        return fingerprint(flow)
    return cached.fingerprint


class _Snapshot:
    """A flow's fingerprint, its modules and tensors at that time, and how often the tensors had been changed."""

    def __init__(self, flow: nn.Module) -> None:
        modules = list(flow.modules())
        # The flow's own dictionary of modules is left out. It holds the blocks, which are a weak key of the cache.
        dicts: list[dict[str, Any]] = [module._modules for module in modules[1:]]
        dicts += [each for module in modules for each in (module._parameters, module._buffers)]
        self._dicts = [each for each in dicts if each]
        self._parts = self._read()
        self._tensors = [part for part in self._parts if isinstance(part, Tensor)]
        self._versions = list(map(_version, self._tensors))
        self.fingerprint = fingerprint(flow)

    def is_current(self) -> bool:
        """Tells if the flow has not changed; it has no Python loop, since every call of `auto` needs it."""
        parts = self._read()
        is_same = len(parts) == len(self._parts) and all(map(is_, parts, self._parts))
        return is_same and list(map(_version, self._tensors)) == self._versions

    def _read(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._dicts)))


_version = attrgetter("_version")
_cache: WeakKeyDictionary[nn.Module, _Snapshot] = WeakKeyDictionary()
