"""State of PyTorch's differentiation and function transforms."""

from __future__ import annotations

import torch
from torch import Tensor


def check_first_derivative(what: str, remedy: str) -> None:
    """Raises RuntimeError in a backward pass with create_graph=True, because `what` has no second derivatives."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"create_graph=True: {what} has no second derivatives; {remedy}")


def is_batched(tensor: Tensor) -> bool:
    """Returns True inside a vmap, or if this PyTorch cannot tell; the values of such a tensor cannot be read."""
    try:
        return bool(torch._C._functorch.is_legacy_batchedtensor(tensor))
    except AttributeError:
        return True
