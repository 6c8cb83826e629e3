"""Side effects of calls: hooks, random numbers, moving estimates, tracing."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def is_traced() -> bool:
    """Returns True if PyTorch does more than compute values.

    It may trace, compile, export, transform a function, differentiate forward, or have a dispatch mode. A PyTorch
    without the private names that tell counts as traced.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    try:
        is_observed = torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack()
        return bool(is_observed) or forward_ad._current_level >= 0
    except AttributeError:
        return True


def is_batched(tensor: Tensor) -> bool:
    """Returns True in a vmap, whose values cannot be compared, or if PyTorch lacks the private name that tells."""
    try:
        return bool(torch._C._functorch.is_legacy_batchedtensor(tensor))
    except AttributeError:
        return True


def has_hooks(module: nn.Module) -> bool:
    """Returns True if the module has forward hooks."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def has_replaced_forward(module: nn.Module) -> bool:
    """Returns True if the object's `forward` is not that of its class."""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def is_stateful(module: nn.Module) -> bool:
    """Returns True if a call of the module itself may draw random numbers or change its state.

    In training mode dropout draws, batch and spectral normalisation move their estimates, and hooks may do anything
    (the older spectral normalisation is one). A replaced `forward` may do so in any mode.
    """
    if has_replaced_forward(module):
        return True
    if not module.training:
        return False
    if isinstance(module, DROPOUTS):
        return module.p > 0
    is_normalization = hasattr(module, "track_running_stats") or hasattr(module, "n_power_iterations")
    return is_normalization or isinstance(module, nn.RReLU) or has_hooks(module)
