"""The text of an `Acceleration`: how each layer of a flow is computed."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from jacobiflow.adapters.library_module import library_class
from jacobiflow.adapters.native_module import NativeModule
from jacobiflow.adapters.part import Part
from jacobiflow.errors import UnsupportedError

MIN_PASSES = 6  # With fewer passes from x = 0, iterates are not compared.
_MAX_NAMES = 8  # Number of names of modules in a line.
_LATEST = {"library": "its own code", "passes": "passes"}  # Backends of calls that native code does not take.


def describe_tolerance(tolerance: float | None) -> str:
    """Returns in words how exact an inverse is."""
    if tolerance is None:
        return "exact to rounding"
    return f"to a tolerance of {tolerance:g}" if tolerance else "to the library's own bits"


def describe(parts: Mapping[nn.Module, Part], tolerance: float | None, reasons: Mapping[str, str]) -> str:
    """Returns a line for the flow, and one for all layers of a class that are computed in the same way."""
    transforms = [part for part in parts.values() if not part.adapter.is_composition]
    modules = [(part.name, part.module, part) for part in transforms] + [
        (f"{part.name}.{part.adapter.layers}.{i}".lstrip("."), layer, part)
        for part in parts.values() for i, layer in enumerate(part.layers) if parts.keys().isdisjoint(layer.modules())
    ]  # fmt: skip
    names: dict[str, list[str]] = {}
    for name, layer, part in modules:
        if name in reasons:
            continue
        way = _describe_way(layer, part, tolerance)
        if way == "native code" and part.latest_use is not None and part.latest_use[1] in _LATEST:
            reason = f": {part.fallback_reason}" if part.fallback_reason else ""
            way += f", in the latest call by {_LATEST[part.latest_use[1]]}{reason}"
        text = f"{part.adapter.library} {library_class(layer).__name__}, by {way}"
        names.setdefault(text, []).append(name)
    for name, reason in reasons.items():
        names.setdefault(f"left alone, {reason}", []).append(name)
    what = f"{len(transforms)} transform{'s' * (len(transforms) > 1)}"
    first = f"accelerated, {describe_tolerance(tolerance)}: {what}" if parts else "nothing was accelerated"
    lines = [f"  {_join_names(some)}: {text}" if any(some) else f"  {text}" for text, some in names.items()]
    return "\n".join([first, *lines])


def _describe_way(layer: nn.Module, part: Part, tolerance: float | None) -> str:
    """Returns how a layer of an accelerated module, or this module itself, is computed."""
    adapter = part.adapter
    if adapter.list_transforms is None:
        return "native code"
    way = "the library" if adapter.needs_native or layer is not part.module else "passes"
    try:
        adapter.check(part.module)
    except UnsupportedError as error:  # It has changed.
        return f"the library: {error}"
    if tolerance == 0:
        return way
    try:
        native = part.find_native(is_conditional=False)
        is_alone = native.mixed is None or layer in getattr(native.mixed, adapter.layers)
        obstacle = NativeModule(layer, adapter.list_transforms, is_conditional=False).obstacle
        if obstacle is not None:
            obstacle = f"native code does not take {obstacle}"
        elif layer is part.module or native.obstacle is None or not is_alone:
            return "native code"
        else:
            obstacle = "native code computes two layers or more"
    except UnsupportedError as error:
        obstacle = str(error)
    condition = "" if way != "passes" or adapter.has_search(layer) else f", if there are {MIN_PASSES} features or more"
    return f"{way}{condition}: {obstacle}"


def _join_names(names: list[str]) -> str:
    """Returns the names of modules, in a row for each parent, which is written once: "net.0, 1, 2; flow.0, 1"."""
    rows: dict[str, list[str]] = {}
    for name in names:
        parent, _, child = name.rpartition(".")
        row = rows.setdefault(parent, [])
        row.append(child if row else name)
    return "; ".join(
        ", ".join(row if len(row) <= _MAX_NAMES else [*row[: _MAX_NAMES - 1], "...", row[-1]]) for row in rows.values()
    )
