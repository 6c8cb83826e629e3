"""The inverse of a masked autoregressive transform by passes of the library's own network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacobiflow.adapters.acceleration import Acceleration
from jacobiflow.adapters.chain import flatten
from jacobiflow.adapters.fixed_point import Pass, iterate
from jacobiflow.adapters.side_effects import has_hooks, is_stateful, is_traced

_MIN_PASSES = 6  # from 0: below, none is saved, and comparing iterates costs more than it gains

Rows = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None, torch.Size]]


def invert(
    acceleration: Acceleration,
    module: nn.Module,
    step: Pass,
    y: Float[Tensor, "*batch d"],
    context: Float[Tensor, "*batch c"] | None,
    passes: int,
    first_iterate: Callable[[Tensor], Tensor] = torch.zeros_like,
    rows: Rows = flatten,
    is_jacobi: bool = True,
    errors: tuple[type[Exception], ...] = (AssertionError,),
) -> Sequence[Tensor] | None:
    """Returns the results of the last pass; `None` if the inverse is left to the library's own loop.

    That loop also decides if other passes may spread a value that is not finite in another way, or if a pass from an
    answer of native code raises an error.

    Args:
        acceleration: Has the tolerance, and counts the passes.
        module: The module of the flow with the transform's parameters.
        step: A pass.
        y: A batch.
        context: A batch with which that of `y` can be broadcast.
        passes: The number of passes in the library's own loop.
        first_iterate: Gives the x from which that loop starts.
        rows: Gives `y` and `context` with a row for each sample.
        is_jacobi: Whether each pass of that loop sets all features.
        errors: Errors of the elementwise inverse at an argument that it cannot invert.
    """
    needs_graph = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (y, context, *module.parameters())
    )
    start = None
    is_left = _needs_all_passes(module, y, needs_graph) or not (is_jacobi or _are_finite(y, context))
    if not is_left:
        start = _moderate_start(acceleration, module, y, context)
        is_left = start is None and passes < _MIN_PASSES
    if is_left:
        acceleration.count(module, passes, "library")
        return None
    tolerance = acceleration.tolerance or 0.0
    if tolerance > 0:
        y, context, _ = rows(y, context)
        context = None if context is None else context.expand(len(y), -1)
        start = None if start is None else start.reshape(y.shape)
    is_solved = start is not None and acceleration.tolerance != 0 and needs_graph
    x = first_iterate(y) if start is None else start
    try:
        outputs, count = iterate(step, y, context, passes, tolerance, needs_graph, x, is_solved)
    except errors:
        if start is None:  # the library's own passes raise it too
            raise
        outputs, count = (), 1
    # A value that is not finite is the library's if the passes are its own.
    if not outputs or not ((is_jacobi and start is None) or _are_finite(*outputs)):
        acceleration.count(module, count + passes, "library")
        return None
    acceleration.count(module, count, "passes")
    return outputs


def _needs_all_passes(module: nn.Module, y: Tensor, needs_graph: bool) -> bool:
    """True if iterates have no values to compare, or a pass may be no function of its argument."""
    if y.is_meta or is_traced():
        return True
    if needs_graph and y.ndim > 2 and not y.is_contiguous():  # PyTorch then multiplies in another order with a graph
        return True
    return any(is_stateful(part) for part in module.modules())


@torch.no_grad()
def _moderate_start(acceleration: Acceleration, module: nn.Module, y: Tensor, context: Tensor | None) -> Tensor | None:
    """The inverse by native code, if all of it is so moderate that no iterate of the library overflows."""
    context = None if context is None else context.detach()
    values = acceleration.evaluate(module, y.detach(), context, is_inverse=True, fallback=None)
    if values is None:
        return None
    x, limit = values[0], torch.finfo(y.dtype).max ** 0.5
    return x if all(t is None or bool((t.abs() <= limit).all()) for t in (x, y, context)) else None


def _are_finite(*tensors: Tensor | None) -> bool:
    return bool(torch.stack([t.isfinite().all() for t in tensors if t is not None]).all())


def premasked(network: Any, masked_linear: type[nn.Module]) -> Any:
    """Returns a network with the values of `network`, bit for bit, in which mask * weight is formed already.

    At 784 features and one sample this product is most of a pass. Each layer of the class `masked_linear`, which
    computes F.linear(x, mask * weight, bias), becomes a linear layer of the product, and each module around it a
    shallow copy. The network itself is only read, as threads may share it. A module that is not the library's own, or
    has hooks or a `forward` of its own, may refer to itself, so it is used as it is, with all its parts. The result
    gives no gradient in the weights.
    """
    kind, library = type(network), masked_linear.__module__.split(".")[0]
    if not isinstance(network, nn.Module) or has_hooks(network) or "forward" in vars(network):
        return network
    if kind.__module__ != nn.Sequential.__module__ and kind.__module__.split(".")[0] != library:
        return network
    if kind is masked_linear:
        product = network._buffers["mask"] * network._parameters["weight"].detach()  # type: ignore[union-attr, operator]
        return _shallow_copy(network, nn.Linear, _parameters=network._parameters | {"weight": product})
    parts = {name: premasked(part, masked_linear) for name, part in network._modules.items()}
    return network if parts == network._modules else _shallow_copy(network, kind, _modules=parts)


def _shallow_copy(module: nn.Module, kind: type[nn.Module], **changes: Any) -> nn.Module:
    copy = object.__new__(kind)
    copy.__dict__.update(vars(module) | changes)
    return copy
