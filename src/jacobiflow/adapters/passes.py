"""The inverse of a masked autoregressive transform by passes x <- g(x) of the library's own network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacobiflow.adapters.acceleration import Acceleration
from jacobiflow.adapters.library_module import DROPOUTS, LIBRARIES, has_forward_hooks, has_replaced_method, shallow_copy
from jacobiflow.adapters.summary import MIN_PASSES
from jacobiflow.fixed_point.implicit import solve_adjoint
from jacobiflow.native.tensors import is_traced
from jacobiflow.utils.autograd import check_first_derivative, is_batched

Pass = Callable[[Any, Tensor], Sequence[Tensor]]
"""Network, x -> (g(x), ...): the next iterate, and the library's other results."""

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # Integers as wide as a number of so many bytes.


def invert_by_passes(
    acceleration: Acceleration,
    module: nn.Module,
    step: Pass,
    network: Any,
    y: Float[Tensor, "*batch d"],
    context: Float[Tensor, "*batch c"] | None,
    passes: int,
    search: Callable[[Any], Tensor] | None = None,
) -> Sequence[Tensor] | None:
    """Returns the results of the last pass; `None` if the inverse is left to the library's own loop.

    At tolerance 0 passes end when one returns its argument bit for bit, as all later ones would. Above 0 they end when
    one changes no entry by more than the tolerance.

    Args:
        module: The module of the flow with the transform's parameters.
        step: A pass of the library.
        network: The library's network, an argument of `step`. Passes without a gradient get a copy, whose
            weights are multiplied by their masks.
        passes: The number of passes in the library's own loop.
        search: Solves for one feature after the other with the network. It replaces passes, except at tolerance 0.
    """
    needs_graph = needs_gradient(module, y, context)
    tolerance, count = acceleration.tolerance or 0.0, 0
    outputs: Sequence[Tensor] = ()
    search = None if acceleration.tolerance == 0 else search
    start = _find_start(acceleration, module, y, context, passes if search is None else MIN_PASSES, needs_graph)
    if start is not None:
        try:
            fast_network = multiply_masks(network)
            if search is None:
                outputs, count = _iterate(partial(step, fast_network), start, passes - needs_graph, tolerance)
            else:
                with torch.no_grad():
                    outputs, count = (search(fast_network),), passes
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # A spline of a user may refuse an iterate that the library's loop does not meet.
            count = 1
    if outputs and needs_graph:
        outputs, count = attach_gradients(outputs[0], partial(step, network), passes, tolerance), count + 1
    if outputs and outputs[0].isfinite().all():
        acceleration.record_use(module, count, "passes")
        return outputs
    acceleration.record_use(module, count + passes, "library")
    return None


def _find_start(
    acceleration: Acceleration, module: nn.Module, y: Tensor, context: Tensor | None, passes: int, needs_graph: bool
) -> Tensor | None:
    """Returns where the passes start; `None` if they cannot end early, or are too few to gain by it.

    They cannot if iterates have no values to compare, or if a pass may depend on more than its argument.
    """
    if y.is_meta or is_traced():
        return None
    if not all(t is None or (t.is_floating_point() and t.layout == torch.strided) for t in (y, context)):
        return None
    if needs_graph and y.ndim > 2 and not y.is_contiguous():  # PyTorch's products have other bits with a graph.
        return None
    if any(map(is_stateful, module.modules())) or not _are_moderate(y, context):
        return None
    if acceleration.tolerance == 0:
        with torch.no_grad():
            of_context = None if context is None else context.detach()
            output = acceleration.evaluate(module, y.detach(), of_context, is_inverse=True, library_call=None)
        # Not every library broadcasts y to a larger batch of contexts.
        if output is not None and output[0].shape == y.shape and _are_moderate(output[0]):
            return output[0]
    return torch.zeros_like(y) if passes >= MIN_PASSES else None


def is_stateful(module: nn.Module) -> bool:
    """Returns True if a call of the module itself may draw random numbers or change its state.

    In training mode dropout draws, batch and spectral normalisation update their estimates, and hooks may do anything.
    A replaced `forward` may do so in any mode.
    """
    if has_replaced_method(module):
        return True
    if not module.training:
        return False
    if isinstance(module, DROPOUTS):
        return module.p > 0
    is_normalization = hasattr(module, "track_running_stats") or hasattr(module, "n_power_iterations")
    return is_normalization or isinstance(module, nn.RReLU) or has_forward_hooks(module)


def _are_moderate(*tensors: Tensor | None) -> bool:
    """Returns True if all entries are finite, and so small that no iterate of the library overflows."""
    bounds = [t.abs() <= torch.finfo(t.dtype).max ** 0.5 for t in tensors if t is not None]
    return bool(torch.stack([is_moderate.all() for is_moderate in bounds]).all())


@torch.no_grad()
def _iterate(
    step: Callable[[Tensor], Sequence[Tensor]], x: Tensor, passes: int, tolerance: float
) -> tuple[Sequence[Tensor], int]:
    """Returns the results of the last pass from `x`, and the number of passes, which is at most `passes`."""
    outputs: Sequence[Tensor] = [x]
    count, is_solved = 0, False
    while count < passes and not is_solved:
        x, outputs, count = outputs[0], step(outputs[0]), count + 1
        is_solved = _has_converged(outputs[0], x, tolerance)
    return outputs, count


def _has_converged(new: Tensor, old: Tensor, tolerance: float) -> bool:
    """Returns True if no entry changed by more than the tolerance, or in any bit if the tolerance is 0."""
    if tolerance > 0:
        return bool(((new - old).abs() <= tolerance).all())
    return new.dtype == old.dtype and torch.equal(new.view(_BITS[new.itemsize]), old.view(_BITS[old.itemsize]))


def needs_gradient(module: nn.Module, *inputs: Tensor | None) -> bool:
    """Returns whether results have a gradient in one of these or in a parameter."""
    tensors = (*inputs, *module.parameters())
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


@torch.enable_grad()
def attach_gradients(
    x: Tensor, step: Callable[[Tensor], Sequence[Tensor]], passes: int, tolerance: float = 0.0
) -> Sequence[Tensor]:
    """Returns the results of a pass at a solution x = g(x), with the gradients of the solution."""
    x = x.detach().requires_grad_()
    outputs: Sequence[Tensor] = _Implicit.apply(x, passes, tolerance, *step(x))
    return outputs


class _Implicit(torch.autograd.Function):
    """Turns the graph of one pass at a solution x = g(x, theta) into that of the solution, see `solve_adjoint`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, passes: int, tolerance: float, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *outputs)
        ctx.passes, ctx.tolerance = passes, tolerance
        ctx.set_materialize_grads(False)
        results = tuple(output.clone() for output in outputs)  # The caller may change them in place.
        ctx.mark_non_differentiable(*(r for r, o in zip(results, outputs, strict=True) if not o.requires_grad))
        return results

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        check_first_derivative("an accelerated inverse", "restore() the flow first")
        x, *outputs = ctx.saved_tensors

        def has_converged(new: Tensor, old: Tensor) -> bool:
            if is_batched(new):  # Values inside a vmap cannot be read.
                return False
            return bool(((new - old).abs().amax(dim=-1) <= ctx.tolerance * new.abs().amax(dim=-1)).all())

        return (None, None, None, solve_adjoint(outputs, x, cotangents, ctx.passes, has_converged), *cotangents[1:])


def multiply_masks(network: Any) -> Any:
    """Returns a copy of a network whose layers hold the product mask * weight.

    The copy returns the same bits. At 784 features and one sample the product is most of the time of a pass. A module
    that is not a library's own, or has hooks or a `forward` of its own, may refer to itself, so it is not copied.
    """
    kind = type(network)
    if not isinstance(network, nn.Module) or has_forward_hooks(network) or "forward" in vars(network):
        return network
    if kind.__module__ != nn.Sequential.__module__ and kind.__module__.split(".")[0] not in LIBRARIES:
        return network
    if kind.__name__ == "MaskedLinear":  # All libraries compute the same by this name.
        product = network._buffers["mask"] * network._parameters["weight"].detach()  # type: ignore[union-attr, operator]
        return shallow_copy(network, nn.Linear, _parameters=network._parameters | {"weight": product})
    parts = {name: multiply_masks(part) for name, part in network._modules.items()}
    return network if parts == network._modules else shallow_copy(network, kind, _modules=parts)
