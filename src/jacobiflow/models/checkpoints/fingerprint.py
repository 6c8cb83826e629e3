"""Fingerprints of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from jacobiflow.errors import InputValueError, UnsupportedError
from jacobiflow.utils.snapshot import Snapshot


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
    if cached is None or not cached[0].is_current():
        modules = list(flow.modules())
        # The flow's own dictionary of modules is left out. It holds the blocks, which are a weak key of the cache.
        dicts = [module._modules for module in modules[1:]]
        dicts += [each for module in modules for each in (module._parameters, module._buffers)]
        try:
            cached = _cache[flow.blocks] = Snapshot(dicts=dicts), fingerprint(flow)
        except UnsupportedError:
            return fingerprint(flow)
    return cached[1]


_cache: WeakKeyDictionary[nn.Module, tuple[Snapshot, str]] = WeakKeyDictionary()
