"""Fingerprints of flows, and the digest of their exact weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from jacobiflow.errors import InputValueError, UnsupportedError
from jacobiflow.utils.snapshot import Snapshot


def fingerprint(flow: Any, state: Mapping[str, Tensor] | None = None) -> str:
    """Returns the SHA-256 of what a flow computes by: its config, the orders of its blocks, its weights and buffers.

    Weights are rounded to bfloat16: it is the same for a flow in float64, float32 and bfloat16, on every device. A
    field of the config counts if it differs from its default, so that a new field changes no fingerprint.

    Args:
        state: The flow's state dict, if its weights are to be taken from there.
    """
    config = [(entry.name, getattr(flow.config, entry.name), entry.default) for entry in fields(flow.config)]
    shape = [(name, value) for name, value, default in config if value != default]
    orders = [block.permutation.order for block in flow.blocks]
    digest = hashlib.sha256(repr((flow.model_type, type(flow.config).__name__, shape, orders)).encode())
    entries = _list_tensors(flow, state)
    for name, value in entries:
        digest.update(f"{name}{tuple(value.shape)}".encode())
    for _, value in entries:
        digest.update(_bytes(value.to(torch.bfloat16) if value.is_floating_point() else value))
    return digest.hexdigest()


def weights_sha256(flow: Any) -> str:
    """Returns the SHA-256 of the exact bytes of a flow's weights and buffers, with their names, shapes and dtypes.

    A job compares it: two flows with the same `fingerprint` may differ by the rounding to bfloat16.
    """
    entries = _list_tensors(flow)
    shapes = [(name, tuple(value.shape), str(value.dtype)) for name, value in entries]
    contents = [_bytes(value) for _, value in entries]
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # A hash releases the interpreter's lock.
        digests = threads.map(lambda content: hashlib.sha256(content).digest(), contents)
        return hashlib.sha256(repr(shapes).encode() + b"".join(digests)).hexdigest()


def _list_tensors(flow: Any, state: Mapping[str, Tensor] | None = None) -> list[tuple[str, Tensor]]:
    """Returns the weights and buffers by their names. The view of a peptide has buffers that its state dict has not."""
    return sorted({**dict(flow.named_buffers()), **(flow.state_dict() if state is None else state)}.items())


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().flatten().view(torch.uint8).numpy().data


def check_fingerprint(expected: str, flow: Any, what: str, remedy: str = "calibrate this one") -> None:
    """Raises ValueError if `flow` has another fingerprint than `expected`."""
    actual = fingerprint(flow)
    if actual != expected:
        raise InputValueError(f"{what} another flow (fingerprint {expected[:12]}, not {actual[:12]}): {remedy}")


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
