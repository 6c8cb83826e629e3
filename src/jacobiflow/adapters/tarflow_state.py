"""The state of a live TarFlow block, to notice changes of it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from jacobiflow.adapters.acceleration import library_class
from jacobiflow.adapters.snapshot import has_forward_hooks

_PYTORCH_NAMES = vars(nn.Module()).keys()  # The attributes of every module.


class BlockState:
    """A copy of the settings and buffers of a block, its classes, and the shapes of its weights.

    Unlike `ModuleSnapshot` it compares attributes of any kind, as a fork of TarFlow may have any.
    """

    def __init__(self, block: nn.Module) -> None:
        self._parts = list(block.modules())
        self._children = [dict(part._modules) for part in self._parts]
        self._bases = list(dict.fromkeys(base for part in self._parts for base in library_class(part).__mro__))
        self._weights = [(part._parameters, name) for part in self._parts for name in part._parameters]
        self._names: list[list[str]] = []
        self._tensors: list[tuple[dict[str, Any], str]] = []
        for part in self._parts:
            state = vars(part)
            own = [name for name in state if name not in _PYTORCH_NAMES]
            self._names.append([name for name in own if not isinstance(state[name], Tensor)])
            self._tensors += [(state, name) for name in own if isinstance(state[name], Tensor)]
            self._tensors += [(part._buffers, name) for name, value in part._buffers.items() if value is not None]
        self._settings = _copy(self._read_settings())
        self._values = [holder[name].clone() for holder, name in self._tensors]

    def is_current(self) -> bool:
        """Returns True if nothing has changed, and there are no hooks."""
        try:
            if [part._modules for part in self._parts] != self._children or any(map(has_forward_hooks, self._parts)):
                return False
            return self._equals(self._read_settings(), [holder[name] for holder, name in self._tensors])
        except Exception:  # An attribute is gone, or cannot be compared.
            return False

    def is_like(self, other: BlockState) -> bool:
        """Returns True if the two blocks differ only in the values of their weights."""
        return self._equals(other._settings, other._values)

    def _equals(self, settings: list[Any], values: list[Tensor]) -> bool:
        return self._settings == settings and all(map(torch.equal, self._values, values))

    def _read_settings(self) -> list[Any]:
        settings: list[Any] = [list(vars(base).values()) for base in self._bases]
        for part, names in zip(self._parts, self._names, strict=True):
            state = vars(part)
            settings.append((library_class(part), len(state), {name: state[name] for name in names}))
        weights = (holder[name] for holder, name in self._weights)
        return [*settings, *(None if weight is None else weight.shape for weight in weights)]


def _copy(value: Any) -> Any:
    """Returns a copy of nested lists and dicts."""
    if type(value) is dict:
        return {name: _copy(entry) for name, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copy, value))
    has_values = type(value).__eq__ is not object.__eq__  # type: ignore[comparison-overlap]
    return copy.copy(value) if has_values else value
