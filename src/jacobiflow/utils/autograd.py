"""Questions about the derivatives that PyTorch takes."""

from __future__ import annotations

import torch
from torch import Tensor


def check_first_derivative(what: str, remedy: str) -> None:
    """Raises RuntimeError in a backward pass with create_graph=True: it has no graph of how x depends on theta."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"create_graph=True: {what} has no second derivatives; {remedy}")


def is_batched(tensor: Tensor) -> bool:
    """Returns True in a vmap, whose values cannot be read, or if PyTorch lacks the private name that tells."""
    try:
        return bool(torch._C._functorch.is_legacy_batchedtensor(tensor))
    except AttributeError:
        return True
