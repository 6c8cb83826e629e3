"""`Snapshot`: notices changes of modules and dictionaries between two calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import attrgetter, getitem
from typing import Any

from torch import Tensor, nn

from jacobiflow.errors import UnsupportedError

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PYTORCH_NAMES = vars(nn.Module()).keys()  # the attributes of every module
_version = attrgetter("_version")


class Snapshot:
    """The structure and attributes of modules, and the entries of dictionaries, at the time when this is made.

    The structure of modules is their classes, except for that of the first, their submodules, and whether they have
    hooks. Entries that are tensors must not be changed in place. PyTorch counts changes by optimizers,
    `load_state_dict` and in-place operations, but not those through `.data` or NumPy.

    Args:
        modules: A module and all modules in it. Their training mode, weights and buffers are left out, except that no
            weight takes the place of `None`.
        dicts: Any dictionaries, such as the buffers of modules.
        kinds: The classes of the attributes that are compared.

    Raises:
        UnsupportedError: If a tensor was made in inference mode, where PyTorch counts no changes.
    """

    def __init__(
        self, modules: Iterable[nn.Module] = (), dicts: Iterable[Mapping[str, Any]] = (), kinds: Any = object
    ) -> None:
        modules = list(modules)
        self._states = list(map(vars, modules))
        self._sizes = list(map(len, self._states))
        self._submodules = modules[1:]
        self._classes = list(map(type, self._submodules))
        self._hooks = [state[name] for state in self._states for name in HOOKS]
        self._has_hooks = any(self._hooks)
        self._dicts = [*(module._modules for module in modules), *dicts]
        self._dicts_before = _copy(self._dicts)
        slots: list[tuple[Any, str]] = [
            (state, name)
            for state in self._states
            for name, value in state.items()
            if name not in _PYTORCH_NAMES and isinstance(value, kinds)
        ]
        self._attribute_slots = _unzip(slots)
        absent = [
            (each._parameters, name) for each in modules for name in each._parameters if each._parameters[name] is None
        ]
        self._absent_slots, self._absent = _unzip(absent), [None] * len(absent)
        self._attributes = [_copy(state[name]) for state, name in slots]
        slots += [(each, name) for each in self._dicts for name in each]
        tensors = [(holder, name) for holder, name in slots if isinstance(holder[name], Tensor)]
        if any(holder[name].is_inference() for holder, name in tensors):
            raise UnsupportedError("tensors of inference mode")
        self._tensor_slots = _unzip(tensors)
        self._versions = [holder[name]._version for holder, name in tensors]

    def is_current(self) -> bool:
        """Returns True if nothing has changed.

        Lists are compared, as Python does that fastest: equal entries are mostly the same object.
        """
        try:
            return (
                list(map(type, self._submodules)) == self._classes
                and list(map(len, self._states)) == self._sizes
                and any(self._hooks) == self._has_hooks
                and self._dicts == self._dicts_before
                and list(map(getitem, *self._attribute_slots)) == self._attributes
                and (not self._absent or list(map(dict.get, *self._absent_slots)) == self._absent)
                and list(map(_version, map(getitem, *self._tensor_slots))) == self._versions
            )
        except Exception:  # Tensors, and other objects of a user, cannot be compared with each other.
            return False


def _unzip(slots: list[tuple[Any, str]]) -> tuple[list[Any], list[str]]:
    return [holder for holder, _ in slots], [name for _, name in slots]


def _copy(value: Any) -> Any:
    """Returns a copy of dictionaries and lists, in which later changes of them do not appear."""
    if isinstance(value, Mapping):
        return {name: _copy(entry) for name, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copy, value))
    return value
