"""Tells one set of weights from another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from jacobiflow.checks import check_kind
from jacobiflow.errors import InputValueError

_VALUES = 1024  # of each tensor: any step of training changes nearly all of them


def fingerprint(flow: nn.Module) -> str:
    """SHA-256 over the names and shapes of all weights and buffers, and up to 1,024 evenly spaced values of each.

    Values are rounded to bfloat16: it is the same for a flow in float64, float32 and bfloat16, on every device.
    """
    check_kind("flow", flow, nn.Module, "a flow")
    return fingerprint_of(flow.state_dict())


def fingerprint_of(state: Mapping[str, Tensor]) -> str:
    """The `fingerprint` of the flow with this state dict."""
    digest, values = hashlib.sha256(), []
    for name, value in sorted(state.items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        flat = value.reshape(-1)
        values.append(flat[:: max(1, len(flat) // _VALUES)])
    if values:
        digest.update(torch.cat(values).to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def check_fingerprint(expected: str, flow: nn.Module, what: str, remedy: str = "calibrate this one") -> None:
    """**Raises** `ValueError` where `flow` has other weights than those of the fingerprint `expected`."""
    actual = fingerprint(flow)
    if actual != expected:
        raise InputValueError(f"{what} another flow (weights {expected[:12]}, this one's {actual[:12]}): {remedy}")
