"""Writes the public surface, names and parameters and options, to tests/public_surface.txt: `make surface`.

Public names are those of `jacobiflow`, of the packages below and of the reference. Annotations are left out: their form
depends on the version of Python.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import PurePath
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from benchmarks import ROOT
from jacobiflow.cli.app import app
from jacobiflow.cli.options import RENAMED

FILE = ROOT / "tests/public_surface.txt"
_PARTS = ("calibration", "data", "evaluation", "fixed_point", "models", "planner", "sampling.folder", "training")
_PACKAGES = ("jacobiflow", *(f"jacobiflow.{part}" for part in _PARTS))  # whose `__all__` is public
_HEADER = (
    "# The public names, parameters and options. `make surface` writes this file; docs/installation.md explains it.\n"
)


def surface() -> str:
    """The text of the file."""
    return "\n".join([_HEADER, *_python(), *_aliases(), *_commands(), ""])


def _find(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def _public() -> dict[str, Any]:
    """Objects by their full names, without names for those that are also in `jacobiflow`."""
    names = {f"{package}.{name}" for package in _PACKAGES for name in importlib.import_module(package).__all__}
    for page in (ROOT / "docs/reference").glob("*.md"):
        names |= {*re.findall("^::: (.+)", page.read_text(), re.MULTILINE)}
    objects = {name: _find(name) for name in sorted(names)}
    first = {id(value) for name, value in objects.items() if name.count(".") == 1}
    return {name: value for name, value in objects.items() if name.count(".") == 1 or id(value) not in first}


def _python() -> Iterator[str]:
    public = _public()
    for name, value in public.items():
        if isinstance(value, type):
            bases = [base for base, cls in public.items() if cls in value.__mro__[1:]]
            is_called = not issubclass(value, Exception | Enum) and not getattr(value, "_is_protocol", False)
            yield f"class {name}{_signature(value) * is_called}{', a ' * bool(bases)}{' and '.join(bases)}"
            inherited = {base for cls in value.__mro__[1:] if cls in public.values() for base in cls.__mro__}
            own = [cls for cls in value.__mro__ if cls not in inherited and cls.__module__.startswith("jacobiflow")]
            yield from sorted(f"    .{line}" for line in _members(own))
        elif inspect.isroutine(value):
            yield f"{name}{_signature(value)}"
        else:
            yield f"{name}: {', '.join(value) if isinstance(value, dict) else _kind(value)}"


def _aliases() -> Iterator[str]:
    """Old names, and names of a package that a user may also import from `jacobiflow`."""
    public = _public()
    for package in _PACKAGES:
        for old, new in getattr(importlib.import_module(package), "_RENAMED", {}).items():
            yield f"{package}.{old}: Old name of {new}."
    for package in _PACKAGES[1:]:
        names = [name for name in sorted(importlib.import_module(package).__all__) if f"{package}.{name}" not in public]
        if names:
            yield f"{package} has jacobiflow's {', '.join(names)}"


def _members(classes: list[type]) -> Iterator[str]:
    """Public methods and attributes, each with the signature of the first class that has it."""
    members: dict[str, str] = {}
    for cls in reversed(classes):
        enum = cls.__members__ if issubclass(cls, Enum) else ()
        members.update(dict.fromkeys([*_documented(cls), *inspect.get_annotations(cls), *enum], ""))
        for name, value in vars(cls).items():
            function = getattr(value, "__func__", value)
            members[name] = _signature(function) if inspect.isroutine(function) else ""
            if isinstance(value, property) and (value.__doc__ or "").startswith("Old name of "):
                members[name] = f": {value.__doc__}"
    yield from (f"{name}{signature}" for name, signature in members.items() if not name.startswith("_"))


def _documented(cls: type) -> list[str]:
    """The names in the section Attributes of a docstring."""
    match = re.search(r"^Attributes:\n((?:    .*\n|\n)+)", f"{inspect.getdoc(cls)}\n", re.MULTILINE)
    return re.findall(r"^    (\w+)[^:\n]*:", match[1], re.MULTILINE) if match else []


def _signature(function: Any) -> str:
    try:
        signature = inspect.signature(function)
    except ValueError:  # A class in C, such as that of a protocol.
        return "(...)"
    plain = [
        parameter.replace(annotation=parameter.empty, default=_Shown.of(parameter.default))
        for parameter in signature.parameters.values()
    ]
    renamed = getattr(getattr(function, "__init__", None) if isinstance(function, type) else function, "renamed", {})
    old = f"; old names: {', '.join(f'{old} of {new}' for old, new in renamed.items())}" if renamed else ""
    return f"{signature.replace(parameters=plain, return_annotation=signature.empty)}{old}"


class _Shown:
    """A default whose `repr` is the same on each machine."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text

    @classmethod
    def of(cls, default: Any) -> Any:
        return default if default is inspect.Parameter.empty else cls(_text(default))


def _text(value: Any) -> str:
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, type) or inspect.isroutine(value):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, PurePath):
        return repr(value.as_posix())
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _commands() -> Iterator[str]:
    for name in app:
        if name.startswith("-"):
            continue
        yield f"\njacobiflow {name}"
        options = app[name].assemble_argument_collection(default_parameter=app.default_parameter)
        yield from sorted(f"    {_option(option)}" for option in options if option.parse and option.name != "*")
    yield "\njacobiflow: old names of options"
    yield from (f"    {old}: Old name of {new}." for old, new in RENAMED.items())


def _option(option: Any) -> str:
    default = option.field_info.default
    state = "required" if option.required else f"default {_text(default)}"
    return f"{', '.join(sorted(option.names))}: {_kind(option.hint)}; {state}"


def _kind(kind: Any) -> str:
    """The name of a type; that of a union does not depend on the version of Python."""
    parts: tuple[Any, ...] = get_args(kind)
    if get_origin(kind) is Annotated:
        return _kind(parts[0])
    if get_origin(kind) in (Union, UnionType):
        return " | ".join(sorted(_kind(part) for part in parts if part is not type(None)))
    if get_origin(kind) is Literal:
        return " | ".join(map(str, parts))
    if get_origin(kind) is not None:
        return f"{get_origin(kind).__name__}[{', '.join('...' if part is ... else _kind(part) for part in parts)}]"
    return getattr(kind, "__name__", str(kind))


if __name__ == "__main__":
    FILE.write_text(surface())
