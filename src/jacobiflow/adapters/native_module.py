"""A library's transform, composition or flow, computed by native code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacobiflow.adapters.fault import fault_as_unsupported
from jacobiflow.adapters.library_module import DROPOUTS, FUNCTIONS, copy_with_tensors, device_types, has_replaced_method
from jacobiflow.errors import UnsupportedError
from jacobiflow.native.chain import TransformChain
from jacobiflow.native.transforms import ChainTransform
from jacobiflow.utils.snapshot import HOOKS, Snapshot

_STATISTICS = "running_var"  # buffer of all batch normalizations
_IS_INITIALIZED = ("initialized", "data_dep_init_done")  # buffers of the ActNorm of nflows, and of normflows
_SETTINGS = (bool, int, float, str, type, dict, *FUNCTIONS)  # Other attributes may be results of calls.

TransformOutput = tuple[Tensor, Tensor | None]
"""The transformed rows, and the log-determinants of the Jacobian if the caller wants them."""

LibraryCall = Callable[[Any, Float[Tensor, "b d"], Float[Tensor, "b c"] | None], TransformOutput]
"""Module, rows, context -> the output by the library's own code."""


ListTransforms = Callable[[Any, bool], Iterable[ChainTransform]]
"""Module, whether there is a context -> its transforms in forward order.

Raises UnsupportedError if native code does not take one of the transforms.
"""


class NativeModule:
    """A library's transform, composition or flow as native code takes it, with a context or without one.

    Attributes:
        chain: Its transforms.
        mixed: If it is a composition of which native code knows only some layers: a composition of the same layers, in
            which those that follow each other are a run, see `Part`.
        mixed_states: The states of modules with which `mixed` was made; `None` before.
    """

    chain: TransformChain
    mixed: nn.Module | None = None
    mixed_states: list[str | None] | None = None

    def __init__(self, module: nn.Module, list_transforms: ListTransforms, is_conditional: bool) -> None:
        self._module, modules = module, list(module.modules())
        self._stateful = [part for part in modules if _is_stateful(part)]
        self._obstacle: str | None = None
        try:
            for part in modules:
                if any(vars(part)[name] for name in HOOKS):
                    raise UnsupportedError(f"a hook on {type(part).__name__}")
                if has_replaced_method(part):
                    raise UnsupportedError(f"a method of its own on {type(part).__name__}")
            if devices := device_types(module) - {"cpu"}:
                raise UnsupportedError(f"tensors on {' and '.join(sorted(devices))}")
            with fault_as_unsupported(module):
                self.chain = TransformChain(list(list_transforms(module, is_conditional)))
            places = [place for transform in self.chain.transforms for place in transform.places]
            self._holders, self._names = [holder for holder, _ in places], [name for _, name in places]
            # Statistics of batches, which training changes, are read at every call.
            buffers = [part._buffers for part in modules if part._buffers and _STATISTICS not in part._buffers]
            self.snapshot = Snapshot(modules, buffers, _SETTINGS)
        except UnsupportedError as error:
            self._obstacle, self._devices = str(error), device_types(module)
            self.snapshot = Snapshot(modules, kinds=_SETTINGS)

    def is_current(self) -> bool:
        """Returns True if the module is as it was when this was made. An obstacle may have been its device."""
        return self.snapshot.is_current() and (self._obstacle is None or self._devices == device_types(self._module))

    @property
    def obstacle(self) -> str | None:
        """Why native code does not take the module, or `None` if it does."""
        return next(filter(None, self.find_states()), self._obstacle) if self._stateful else self._obstacle

    def find_states(self) -> list[str | None]:
        """Returns why native code does not take modules in their present state, or `None` for those that it takes."""
        return list(map(_find_state, self._stateful))

    def tensors(self) -> list[Any]:
        """Returns the tensors of the chain as they are now."""
        return list(map(dict.get, self._holders, self._names))

    def evaluate_in_pytorch(
        self, library_call: LibraryCall, x: Tensor, context: Tensor | None, tensors: Sequence[Tensor]
    ) -> TransformOutput:
        """Repeats a call by the library's code, with these tensors as weights."""
        places = zip(map(id, self._holders), self._names, strict=True)
        module = copy_with_tensors(self._module, dict(zip(places, tensors, strict=True)))
        return library_call(module, x, None if context is None else context.expand(len(x), -1))


def _is_stateful(module: nn.Module) -> bool:
    """Returns True if native code takes the module only in some states, see `_find_state`."""
    names = module._buffers.keys() & {_STATISTICS, *_IS_INITIALIZED}
    return bool(names or vars(module).get("using_cache") or (isinstance(module, DROPOUTS) and module.p > 0))


def _find_state(module: Any) -> str | None:
    """Returns why native code does not take a module in its present state, or `None` if it does."""
    buffers, is_training = module._buffers, module.training
    if isinstance(module, DROPOUTS):
        return "dropout in training mode" if is_training else None
    if _STATISTICS in buffers:
        return "batch normalization in training mode" if is_training else None
    if "using_cache" in vars(module):  # A full cache of nflows may be older than the weights.
        is_full = any(value is not None for value in vars(module.cache).values())
        return "a cache of weights in evaluation mode" if is_full and not is_training else None
    of_nflows, of_normflows = map(buffers.get, _IS_INITIALIZED)
    is_initialized = of_nflows or not is_training if of_normflows is None else of_normflows
    return None if is_initialized else "the first batch, which initializes an ActNorm"


def flatten_batch(
    x: Float[Tensor, "*batch d"], context: Float[Tensor, "*batch c"] | None
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "#b c"] | None, torch.Size]:
    """Returns the rows, one context for each row or for all, and the shape of the batch that both broadcast to.

    Raises UnsupportedError if they do not broadcast.
    """
    if x.ndim == 2 and (context is None or (context.ndim == 2 and context.shape[0] == x.shape[0])):
        return x, context, x.shape[:-1]
    try:
        batch, features = x.shape[:-1], x.shape[-1]
        if context is None:
            return x.reshape(-1, features), None, batch
        batch_of_context, width = context.shape[:-1], context.shape[-1]
        if batch_of_context != batch and (len(batch_of_context) > len(batch) or batch_of_context.numel() != 1):
            batch = torch.broadcast_shapes(batch, batch_of_context)  # It is slow, so it is called only if needed.
            x = x.expand(*batch, features)
        if batch_of_context.numel() == 1:
            return x.reshape(-1, features), context.reshape(1, width), batch
        return x.reshape(-1, features), context.expand(*batch, width).reshape(-1, width), batch
    except (IndexError, RuntimeError) as error:
        raise UnsupportedError("rows and a context of shapes that do not fit") from error
