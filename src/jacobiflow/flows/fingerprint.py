"""Fingerprints of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple
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


def cached_fingerprint(flow: nn.Module) -> str:
    """Returns the `fingerprint`, computed again only if a tensor was replaced or changed since the last call.

    PyTorch counts changes by optimizers, `load_state_dict` and in-place operations, not those through `.data` or NumPy.
    """
    owner = getattr(flow, "blocks", flow)  # shared by the views of a flow
    cached = _cache.get(owner)
    try:
        if cached is None or cached.state != cached.places.state():
            places = _Places(flow)
            cached = _cache[owner] = _Cached(places, places.state(), fingerprint(flow))
    except RuntimeError:  # PyTorch counts no changes of tensors that were made in inference mode
        return fingerprint(flow)
    return cached.value


class _Places:
    """The dictionaries in which a flow's modules keep their tensors: several times faster than a walk."""

    def __init__(self, flow: nn.Module) -> None:
        modules = list(flow.modules())
        # Without those of the flow itself, which would keep its blocks alive.
        self._submodules: list[dict[str, Any]] = [module._modules for module in modules[1:] if module._modules]
        places: list[dict[str, Any]] = [place for module in modules for place in (module._parameters, module._buffers)]
        self._tensors = [place for place in places if place]

    def state(self) -> tuple[list[int], ...]:
        """Identities of the modules, and addresses and versions of the tensors."""
        # No loops in Python: this is most of the time of a second call of `auto`.
        tensors = [tensor for tensor in chain.from_iterable(map(dict.values, self._tensors)) if tensor is not None]
        return (
            list(map(id, chain.from_iterable(map(dict.values, self._submodules)))),
            list(map(Tensor.data_ptr, tensors)),
            list(map(_version, tensors)),
        )


class _Cached(NamedTuple):
    places: _Places
    state: tuple[list[int], ...]
    value: str


_version = attrgetter("_version")
_cache: WeakKeyDictionary[Any, _Cached] = WeakKeyDictionary()
