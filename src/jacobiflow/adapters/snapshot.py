"""Notices changes of a library's module between two calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from operator import is_
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from jacobiflow.adapters.network import Slot
from jacobiflow.errors import UnsupportedError

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_FUNCTIONS = (partial, FunctionType, BuiltinFunctionType, MethodType)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SETTINGS = (bool, int, float, str, type, *_FUNCTIONS)


class ModuleSnapshot:
    """The submodules, settings and hooks of a module, but not the values of its weights.

    It is compared with the module before every native call. Lists are compared, as Python does that fastest.

    Args:
        constants: Tensors that must not change.
    """

    def __init__(self, module: nn.Module, constants: Sequence[Slot]) -> None:
        self._modules = list(module.modules())
        self._classes = list(map(type, self._modules))
        self._states = list(map(vars, self._modules))
        self._sizes = list(map(len, self._states))
        self._children = [part._modules for part in self._modules]
        self._children_before = list(map(dict, self._children))
        self._hooks = [state[name] for state in self._states for name in _HOOKS]
        self._has_hooks = any(self._hooks)
        settings = [slot for part in self._modules for slot in _settings(part)]
        self._setting_holders, self._setting_names = _unzip(settings)
        self._settings = [state[name] for state, name in settings]
        self._constant_holders, self._constant_names = _unzip(constants)
        self._constants: list[Tensor] = [holder[name] for holder, name in constants]
        self._versions = [tensor._version for tensor in self._constants]

    def is_current(self) -> bool:
        """Returns True if nothing has changed."""
        return (
            list(map(type, self._modules)) == self._classes
            and list(map(len, self._states)) == self._sizes
            and self._children == self._children_before
            and list(map(dict.get, self._setting_holders, self._setting_names)) == self._settings
            and any(self._hooks) == self._has_hooks
            and all(map(is_, map(dict.get, self._constant_holders, self._constant_names), self._constants))
            and [tensor._version for tensor in self._constants] == self._versions
        )


def _settings(module: nn.Module) -> Iterator[Slot]:
    """Yields the attributes on which a call of the module depends. Only dropout depends on the training mode."""
    is_dropout = isinstance(module, DROPOUTS) and module.p > 0
    for name, value in vars(module).items():
        if isinstance(value, _SETTINGS) and (name != "training" or is_dropout):
            yield vars(module), name


def _unzip(slots: Sequence[Slot]) -> tuple[list[dict[str, Any]], list[str]]:
    return [holder for holder, _ in slots], [name for _, name in slots]


def check_call(module: nn.Module) -> None:
    """Raises UnsupportedError if a call of the module is random, or does more than its class's `forward`."""
    if any(vars(module)[name] for name in _HOOKS):
        raise UnsupportedError(f"a hook on {type(module).__name__}")
    if has_replaced_method(module):
        raise UnsupportedError(f"a method of its own on {type(module).__name__}")
    if isinstance(module, DROPOUTS) and module.training and module.p > 0:
        raise UnsupportedError("dropout in training mode")


def has_forward_hooks(module: nn.Module) -> bool:
    """Returns True if the module has forward hooks."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def has_replaced_method(module: nn.Module) -> bool:
    """Returns True if an attribute of the module replaces a method of its class, such as `forward`."""
    kind = type(module)
    return any(
        isinstance(value, _FUNCTIONS) and isinstance(of_class := getattr(kind, name, None), FunctionType)
        and getattr(value, "__func__", None) is not of_class
        for name, value in vars(module).items()
    )  # fmt: skip
