"""Calls of native code with all transforms of a module together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from threading import Lock, local
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacobiflow.adapters.network import MaskedNetwork, Slot, find_order
from jacobiflow.native.boundary import UnsupportedError, is_traced
from jacobiflow.native.chain import TransformChain
from jacobiflow.native.masked import (
    ChainTransform,
    MaskedOperation,
    Steps,
    affine_transform,
    masked_transform,
    normal_transform,
    permutation_transform,
)

Values = tuple[Tensor, Tensor | None]
"""Rows after a chain, and the logarithm of the determinant of its Jacobian if a caller wants it."""

Fallback = Callable[[Float[Tensor, "b d"], Float[Tensor, "b c"] | None], Values]
"""Rows, context -> values by the library's own code."""

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_FUNCTIONS = (partial, FunctionType, BuiltinFunctionType, MethodType)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SETTINGS = (bool, int, float, str, type, *_FUNCTIONS)


@dataclass(frozen=True)
class Part:
    """A transform of a library for native code.

    Attributes:
        module: The library's transform.
        transform: Its operations count `tensors`.
        tensors: Weights, biases, scales and shifts, whose values are read at every call.
        constants: Masks and indices, which must not change.
    """

    module: nn.Module
    transform: ChainTransform
    tensors: Sequence[Slot] = ()
    constants: Sequence[Slot] = ()


Describe = Callable[[Any, bool], Iterator[tuple[Part, bool]]]
"""module, whether there is a context -> its transforms in forward order, each with whether the module has its inverse.

Raises UnsupportedError if native code does not take one of them.
"""


def masked_part(module: nn.Module, network: MaskedNetwork, **settings: Any) -> Part:
    """Returns an elementwise transform, of fields `settings`, with the parameters that a masked network gives."""
    order, starts, (inputs, *units) = find_order(network)
    operations = list(map(MaskedOperation, network.operations, units, network.masks))
    features, parameters = network.outputs.shape
    transform = masked_transform(
        Steps(order, starts, inputs), operations, _shapes(network.tensors), parameters, network.width - features,
        network.context, context_start=0 if network.features.start else features, **settings,
    )  # fmt: skip
    return Part(module, transform, network.tensors, network.constants)


def permutation_part(module: nn.Module, order: Sequence[int], slot: Slot | None = None) -> Part:
    """Returns the transform y_i = x_order[i]; `slot` is the tensor that holds the order."""
    return Part(module, permutation_transform(order), constants=() if slot is None else (slot,))


def affine_part(module: nn.Module, scale: Slot, shift: Slot) -> Part:
    """Returns the transform y = scale x + shift, of one number or of one for each feature."""
    return Part(module, affine_transform(*_shapes((scale, shift))), (scale, shift))


def normal_part(module: nn.Module, scale: Slot, loc: Slot) -> Part:
    """Returns the transform y = x whose log-determinant is the log-density of N(loc, scale^2) at x."""
    shapes = _shapes((scale, loc))
    if len(shapes[0]) != 1 or shapes[0] != shapes[1]:
        raise UnsupportedError("a normal distribution of another shape")
    return Part(module, normal_transform(shapes[0][0]), (scale, loc))


def _shapes(slots: Sequence[Slot]) -> list[torch.Size]:
    return [holder[name].shape for holder, name in slots]


class Snapshot:
    """All of a module on which a chain depends, except the values of tensors that it reads at every call."""

    def __init__(self, module: nn.Module) -> None:
        self._modules: list[tuple[Any, ...]] = []
        self._parents: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._constants: list[tuple[dict[str, Any], str, Tensor, int]] = []
        for part in module.modules():
            state = vars(part)
            names = [name for name, value in state.items() if isinstance(value, _SETTINGS)]
            if not isinstance(part, DROPOUTS):  # no other layer that native code takes depends on the mode
                names.remove("training")
            read = itemgetter(*names, "_modules", *_HOOKS)
            self._modules.append((part, type(part), state, len(state), read, read(state)))
            if part._modules:
                self._parents.append((part._modules, dict(part._modules)))
        self._hooks = [hooks for part in module.modules() for hooks in itemgetter(*_HOOKS)(vars(part))]
        self._has_hooks = any(self._hooks)

    def add(self, holder: dict[str, Any], name: str) -> None:
        """Adds a tensor that must not change."""
        tensor: Tensor = holder[name]
        if tensor.is_inference():
            raise UnsupportedError("masks of inference mode")
        self._constants.append((holder, name, tensor, tensor._version))

    def is_current(self) -> bool:
        """Returns True if nothing has changed."""
        for part, kind, state, size, read, values in self._modules:
            if type(part) is not kind or len(state) != size or read(state) != values:
                return False
        if any(self._hooks) != self._has_hooks or any(now != before for now, before in self._parents):
            return False
        for holder, name, tensor, version in self._constants:
            if holder.get(name) is not tensor or tensor._version != version:
                return False
        return True


class Chain:
    """The transforms of a transform or composition as native code takes them, with a context or without.

    Attributes:
        obstacle: Why native code does not take the module, or `None` if it does.
        modules: The library's transforms.
    """

    def __init__(self, module: nn.Module, describe: Describe, is_conditional: bool) -> None:
        self.snapshot = Snapshot(module)
        self.obstacle: str | None = None
        self.modules: list[nn.Module] = []
        try:
            for child in module.modules():
                _check_call(child)
            parts = list(describe(module, is_conditional))
            self._chain = TransformChain([(part.transform, is_inverse) for part, is_inverse in parts])
            for slot in (slot for part, _ in parts for slot in part.constants):
                self.snapshot.add(*slot)
        except UnsupportedError as error:
            self.obstacle = str(error)
        else:
            self._tensors = [slot for part, _ in parts for slot in part.tensors]
            self.modules = [part.module for part, _ in parts]

    def evaluate(
        self,
        x: Float[Tensor, "b d"],
        context: Float[Tensor, "#b c"] | None,
        is_inverse: bool,
        fallback: Fallback | None,
        log_det: str | None = None,
    ) -> Values | None:
        """Returns the values of the chain and their log-determinants; `None` if native code cannot compute them.

        They have gradients if anything requires one. The arguments are those of `native.chain.TransformChain`.
        `fallback` computes the rows that are not finite, or overflow on the way. If there are any, there is no result
        without it, or with gradients.
        """
        if self.obstacle is not None:
            return None
        tensors: list[Any] = [holder.get(name) for holder, name in self._tensors]
        in_pytorch = None
        if fallback is not None and torch.is_grad_enabled():
            in_pytorch = partial(self._in_pytorch, tensors, _versions(tensors), fallback)
        result = self._chain.evaluate(tensors, x, context, is_inverse, log_det, in_pytorch)
        if result is None or result.failed is None:
            return None if result is None else (result.values, result.log_det)
        if fallback is None:
            return None
        rows = result.failed.nonzero().flatten()
        values, log_dets = fallback(x[rows], None if context is None else context.expand(len(x), -1)[rows])
        result.values[rows] = values
        if result.log_det is not None and log_dets is not None:
            result.log_det[rows] = log_dets
        return result.values, result.log_det

    def _in_pytorch(
        self, originals: Sequence[Tensor], versions: list[int] | None, fallback: Fallback, x: Tensor,
        context: Tensor | None, tensors: Sequence[Tensor],
    ) -> Values:  # fmt: skip
        """The values of a call by the library's code, with these `tensors` in place of the `originals`."""
        now = [holder.get(name) for holder, name in self._tensors]
        if _versions(originals) != versions or any(a is not b for a, b in zip(now, originals, strict=True)):
            raise RuntimeError(
                "second derivatives of a flow that jf.accelerate made fast, and whose weights have changed since the "
                "forward pass; restore() the flow first"
            )
        with acceleration_off():
            try:
                for (holder, name), tensor in zip(self._tensors, tensors, strict=True):
                    holder[name] = tensor
                return fallback(x, None if context is None else context.expand(len(x), -1))
            finally:
                for (holder, name), tensor in zip(self._tensors, originals, strict=True):
                    holder[name] = tensor


def _versions(tensors: Sequence[Tensor]) -> list[int] | None:
    """The numbers of changes in place of tensors; `None` if one does not count them."""
    try:
        return [tensor._version for tensor in tensors]
    except (AttributeError, RuntimeError):  # a missing tensor, or one of inference mode
        return None


_lock = Lock()
_thread = local()


@contextmanager
def acceleration_off() -> Iterator[None]:
    """Makes accelerated modules run the library's own code in this thread. One thread at a time can do so."""
    with _lock:
        _thread.is_off = True
        try:
            yield
        finally:
            _thread.is_off = False


def is_acceleration_off() -> bool:
    """Returns True inside `acceleration_off`."""
    return getattr(_thread, "is_off", False)


def _check_call(module: nn.Module) -> None:
    """Checks that a call of the module runs its class's `forward`, which draws no random numbers, and nothing else."""
    if any(vars(module)[name] for name in _HOOKS):
        raise UnsupportedError(f"a hook on {type(module).__name__}")
    if has_replaced_method(module):
        raise UnsupportedError(f"a method of its own on {type(module).__name__}")
    if isinstance(module, DROPOUTS) and module.training and module.p > 0:
        raise UnsupportedError("dropout in training mode")


def has_hooks(module: nn.Module) -> bool:
    """Returns True if the module has forward hooks."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def has_replaced_method(module: nn.Module) -> bool:
    """Returns True if a method of the object, `forward` for one, is not that of its class."""
    kind = type(module)
    return any(
        isinstance(value, _FUNCTIONS) and isinstance(of_class := getattr(kind, name, None), FunctionType)
        and getattr(value, "__func__", None) is not of_class
        for name, value in vars(module).items()
    )  # fmt: skip


def is_plain_call() -> bool:
    """Returns True if PyTorch would compute values, in the dtype of the arguments, and a graph at most."""
    return not is_acceleration_off() and not is_traced() and not torch.is_autocast_enabled("cpu")


def flatten(
    x: Float[Tensor, "*batch d"], context: Float[Tensor, "*batch c"] | None
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "#b c"] | None, torch.Size]:
    """Returns rows of the batch that `x` and `context` span, one context for each or for all, and its shape."""
    batch, features = x.shape[:-1], x.shape[-1]
    if x.ndim == 2 and (context is None or (context.ndim == 2 and context.shape[0] == batch[0])):
        return x, context, batch
    if context is None:
        return x.reshape(-1, features), None, batch
    batch_of_context, width = context.shape[:-1], context.shape[-1]
    if batch_of_context != batch and (len(batch_of_context) > len(batch) or batch_of_context.numel() != 1):
        batch = torch.broadcast_shapes(batch, batch_of_context)  # slow, so only if need be
        x = x.expand(*batch, features)
    if batch_of_context.numel() == 1:
        return x.reshape(-1, features), context.reshape(1, width), batch
    return x.reshape(-1, features), context.expand(*batch, width).reshape(-1, width), batch
