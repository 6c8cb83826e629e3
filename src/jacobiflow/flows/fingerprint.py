"""Tells one set of weights from another."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def fingerprint(flow: nn.Module) -> str:
    """SHA-256 over the names, shapes and bfloat16-rounded values of all weights and buffers, in hexadecimal.

    Rounding makes it the same for a flow in float64, float32 and bfloat16, on every device.
    """
    digest = hashlib.sha256()
    for name, value in sorted(flow.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
