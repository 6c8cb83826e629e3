"""Passes of a masked autoregressive transform's network: when they may be left out, and how they are made cheaper."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_CONTAINERS = nn.Sequential.__module__
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)


def is_traced() -> bool:
    """True if PyTorch does more than compute values.

    It may trace, compile, export, transform a function, differentiate forward, or have a dispatch mode. If this PyTorch
    has no private names to tell by, it counts as traced.
    """
    transforming = getattr(torch._C, "_are_functorch_transforms_active", None)
    return bool(
        transforming is None or transforming() or torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or getattr(forward_ad, "_current_level", 0) >= 0 or _modes() > 0
    )  # fmt: skip


def needs_all_passes(module: nn.Module, y: Tensor, graph: bool) -> bool:
    """True if the inverse of `y` by the transform `module` is left to the library's own loop.

    So it is if iterates have no values to compare, or tangents need more passes than values (see `is_traced`; meta
    tensors); if PyTorch multiplies a batch by a matrix in another order with a `graph` than without; and if a pass may
    be no function of its argument (see `_may_draw_or_move`).
    """
    if y.is_meta or is_traced():
        return True
    if graph and y.ndim > 2 and not y.is_contiguous():
        return True
    return any(_may_draw_or_move(part) for part in module.modules())


def _may_draw_or_move(module: nn.Module) -> bool:
    """True if a call of `module` may draw random numbers or change its state.

    In training mode dropout draws, and batch and spectral normalisation move their estimates; hooks may do anything
    (the older spectral normalisation is one). So may a `forward` that was replaced on the object, in any mode.
    """
    forward = vars(module).get("forward")
    if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        return True
    if not module.training:
        return False
    if isinstance(module, _DROPOUTS):
        return module.p > 0
    normalizes = hasattr(module, "track_running_stats") or hasattr(module, "n_power_iterations")
    return normalizes or isinstance(module, nn.RReLU) or _has_hooks(module)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_pre_hooks or module._forward_hooks)


def needs_graph(module: nn.Module, *tensors: Tensor | None) -> bool:
    """True if the inverse is to have a gradient in any of these tensors, or in a parameter of `module`."""
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in (*tensors, *module.parameters()))


def premasked(network: Any, masked_linear: type[nn.Module]) -> Any:
    """A network that gives the values of `network`, bit for bit, with mask * weight of its layers formed already.

    At 784 features and one sample this product is most of a pass. Each layer of the class `masked_linear`, which
    computes F.linear(x, mask * weight, bias), becomes a linear layer of the product, and each module around it a
    shallow copy. The network itself is only read: threads may share it, and nobody else sees a change. A module that is
    not the library's own, or has hooks or a `forward` of its own, may refer to itself, so it is used as it is, with all
    that it holds. The result gives no gradient in the weights.
    """
    kind, library = type(network), masked_linear.__module__.split(".")[0]
    if kind.__module__ != _CONTAINERS and kind.__module__.split(".")[0] != library:
        return network
    if not isinstance(network, nn.Module) or "forward" in vars(network) or _has_hooks(network):
        return network
    if kind is masked_linear:
        product = network._buffers["mask"] * network._parameters["weight"].detach()  # type: ignore[union-attr, operator]
        return _shallow_copy(network, nn.Linear, _parameters=network._parameters | {"weight": product})
    parts = {name: premasked(part, masked_linear) for name, part in network._modules.items()}
    return network if parts == network._modules else _shallow_copy(network, kind, _modules=parts)


def _shallow_copy(module: nn.Module, kind: type[nn.Module], **changed: Any) -> nn.Module:
    copied = object.__new__(kind)
    copied.__dict__.update(vars(module) | changed)
    return copied
