"""Modules of the libraries: their classes without acceleration, their copies, and what they do beside their class."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

LIBRARIES = {  # Package on PyPI, first supported version, end of the supported versions.
    "zuko": ("zuko", "1.3", "2"), "nflows": ("nflows", "0.14", "0.15"), "glasflow": ("glasflow", "0.4", "0.5"),
    "normflows": ("normflows", "1.7", "2"), "pyro": ("pyro-ppl", "1.9", "2"),
}  # fmt: skip
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
FUNCTIONS = (partial, FunctionType, BuiltinFunctionType, MethodType)


def is_accelerated(module: nn.Module) -> bool:
    """Returns True if an `Acceleration` made the module's class."""
    return "library_class" in vars(type(module))


def library_class(module: nn.Module) -> type[nn.Module]:
    """Returns the class that the module has without acceleration."""
    return vars(type(module)).get("library_class", type(module))


def default_of(function: Callable[..., Any], name: str) -> Any:
    """Returns the default of a parameter of a library's function or class, which another version may change."""
    return inspect.signature(function).parameters[name].default


def shallow_copy(module: nn.Module, kind: type[nn.Module], **changes: Any) -> nn.Module:
    """Returns a module of this class with the same attributes, except for the changes."""
    copy = object.__new__(kind)
    copy.__dict__.update(vars(module) | changes)
    return copy


def copy_with_tensors(module: nn.Module, tensors: Mapping[tuple[int, str], Tensor]) -> nn.Module:
    """Returns a copy of the library's classes with other tensors, by the id of their dictionary and their name in it.

    `torch.func.functional_call` would change the module itself, which other threads may use.
    """
    copies = {part: shallow_copy(part, library_class(part)) for part in module.modules()}
    for part, copy in copies.items():
        vars(copy)["_modules"] = {
            name: None if child is None else copies[child] for name, child in part._modules.items()
        }
        for kind in ("_parameters", "_buffers"):
            entries = vars(part)[kind]
            vars(copy)[kind] = {name: tensors.get((id(entries), name), tensor) for name, tensor in entries.items()}
    return copies[module]


def device_types(module: nn.Module) -> set[str]:
    """Returns the types of the devices of a module's tensors."""
    holders = [holder for part in module.modules() for holder in (part._parameters, part._buffers)]
    return {tensor.device.type for holder in holders for tensor in holder.values() if tensor is not None}


def has_forward_hooks(module: nn.Module) -> bool:
    """Returns True if the module has forward hooks."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def has_replaced_method(module: nn.Module) -> bool:
    """Returns True if an attribute of the module replaces a method of its class, such as `forward`."""
    kind = type(module)
    return any(
        isinstance(value, FUNCTIONS) and isinstance(of_class := getattr(kind, name, None), FunctionType)
        and getattr(value, "__func__", None) is not of_class
        for name, value in vars(module).items()
    )  # fmt: skip
