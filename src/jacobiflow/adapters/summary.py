"""The text of an `Acceleration`: how each layer of a flow is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from jacobiflow.adapters.library_module import is_accelerated, library_class
from jacobiflow.adapters.native_module import NativeModule
from jacobiflow.adapters.part import Part
from jacobiflow.errors import UnsupportedError

MIN_PASSES = 6  # With fewer passes from x = 0, comparing iterates costs more time than it saves.
_MAX_NAMES = 8  # Number of names of modules in a line.


def describe_tolerance(tolerance: float | None) -> str:
    """Returns in words how exact an inverse is."""
    if tolerance is None:
        return "exact to rounding"
    return f"to a tolerance of {tolerance:g}" if tolerance else "to the library's own bits"


def describe(parts: Mapping[nn.Module, Part], tolerance: float | None, reasons: Mapping[str, str]) -> str:
    """Returns a line for the flow, and one for all layers of a class that are computed in the same way."""
    transforms = [part for part in parts.values() if not part.adapter.is_composition]
    layers = [
        (part.name, part.module, part, *_method_without_native(part)) for part in transforms
    ] + [
        (name, layer, part, "the library", "")
        for part in parts.values() for name, layer in part.list_layers().items()
        if parts.keys().isdisjoint(layer.modules()) and name not in reasons
    ]  # fmt: skip
    native = {module for part in parts.values() for module in _list_native(part, tolerance)}
    lines: dict[str, str] = {}
    for name, layer, part, method, condition in layers:
        if layer in native:
            method = "native code"
        elif tolerance != 0:
            method += f"{condition}: {_find_obstacle(layer, part)}"
        lines[name] = f"{part.adapter.library} {library_class(layer).__name__}, by {method}"
    lines |= {name: f"left alone, {reason}" for name, reason in reasons.items()}
    what = f"{len(transforms)} transform{'s' * (len(transforms) > 1)}"
    first = f"accelerated, {describe_tolerance(tolerance)}: {what}" if parts else "nothing was accelerated"
    return "\n".join([first, *_lines_of(lines)])


def _method_without_native(part: Part) -> tuple[str, str]:
    """Returns how a transform is inverted without native code, and on which condition."""
    if part.adapter.needs_native:
        return "the library", ""
    return "passes", "" if part.adapter.has_search(part.module) else f", if there are {MIN_PASSES} features or more"


def _list_native(part: Part, tolerance: float | None) -> Iterator[nn.Module]:
    """Yields the modules in an accelerated module that native code computes."""
    if part.adapter.list_transforms is None:
        yield part.module
        return
    try:
        native = part.find_native(is_conditional=False)
    except UnsupportedError:
        return
    if tolerance == 0:
        return
    if native.obstacle is None:
        yield from part.module.modules()
    elif native.mixed is not None:
        for run in filter(is_accelerated, native.mixed.modules()):
            acceleration: Any = run.acceleration
            yield from _list_native(acceleration.parts[run], tolerance)


def _find_obstacle(layer: nn.Module, part: Part) -> str:
    """Returns why native code does not compute a layer of an accelerated module, or this module itself."""
    try:
        native = part.find_native(is_conditional=False)
    except UnsupportedError as error:
        return str(error)
    if layer is not part.module and part.adapter.list_transforms is not None:
        native = NativeModule(layer, part.adapter.list_transforms, is_conditional=False)
    if native.obstacle is None:
        return "native code computes two layers or more"
    return f"native code does not know {native.obstacle}"


def _lines_of(texts: dict[str, str]) -> list[str]:
    """Returns a line for each text, after the names of the modules that it holds for."""
    names: dict[str, list[str]] = {}
    for name, text in texts.items():
        names.setdefault(text, []).append(name)
    return [f"  {_join_names(some)}: {text}" if any(some) else f"  {text}" for text, some in names.items()]


def _join_names(names: list[str]) -> str:
    """Returns the names of modules in a row. A parent that all of them share is written once."""
    parent, _, _ = names[0].rpartition(".")
    if all(name.rpartition(".")[0] == parent for name in names):
        names = [names[0], *(name.rpartition(".")[2] for name in names[1:])]
    return ", ".join(names if len(names) <= _MAX_NAMES else [*names[: _MAX_NAMES - 1], "...", names[-1]])
