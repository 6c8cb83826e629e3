"""The structures and enumerations that Python and C++ share, as src/boundary.h declares them.

Nothing else makes these structures. The module imports nothing of the package, since each build of the library runs it,
see `compiler.compile_library`.
"""

from __future__ import annotations

import ctypes
import re
from enum import IntEnum
from pathlib import Path
from typing import Any

_HEADER = (Path(__file__).parent / "src" / "boundary.h").read_text()
_TYPES: dict[str, Any] = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "double": ctypes.c_double}
_enumerations = list[Any]()
_structures = list[Any]()


def _read_body(declaration: str) -> str:
    """Returns what stands in the braces of a structure or an enumeration."""
    return _HEADER.partition(f"{declaration} {{")[2].partition("};")[0]


def _read_enumeration(name: str) -> Any:
    """Returns an enumeration, with its members in capitals."""
    make: Any = IntEnum
    enumeration = make(name, re.findall(r"\w+", _read_body(f"enum class {name} : int32_t").upper()), start=0)
    _enumerations.append(enumeration)
    _TYPES[name] = ctypes.c_int32
    return enumeration


def _read_structure(name: str) -> Any:
    """Returns a structure, whose fields have a line each."""
    declarations = re.findall(r"^  (.+?)(\w+);", _read_body(f"struct {name}"), re.MULTILINE)
    fields = [(field, ctypes.c_void_p if "*" in kind else _TYPES[kind.strip()]) for kind, field in declarations]
    structure = type(name, (ctypes.Structure,), {"_fields_": fields})
    _structures.append(structure)
    _TYPES[name] = structure
    return structure


OperationKind = _read_enumeration("OperationKind")
Activation = _read_enumeration("Activation")
TransformKind = _read_enumeration("TransformKind")
ScaleActivation = _read_enumeration("ScaleActivation")
SplineBoundary = _read_enumeration("SplineBoundary")
WeightFormat = _read_enumeration("WeightFormat")

Operation = _read_structure("Operation")
Transform = _read_structure("Transform")
ChainArgs = _read_structure("ChainArgs")
GradientArgs = _read_structure("GradientArgs")
Weight = _read_structure("Weight")
WeightCopy = _read_structure("WeightCopy")
LayerArgs = _read_structure("LayerArgs")
TransformerArgs = _read_structure("TransformerArgs")


def layout_assertions() -> str:
    """Returns C++ code that compiles only if all structures and enumerations are to C++ what they are here."""
    lines = ["#include <cstddef>", '#include "boundary.h"', "using namespace jacobiflow;"]
    for enumeration in _enumerations:
        lines += [f"static_assert((int){enumeration.__name__}::{m.name.lower()} == {m.value});" for m in enumeration]
    for structure in _structures:
        name = structure.__name__
        is_template = f"template <typename T>\nstruct {name} {{" in _HEADER
        for kind in (f"{name}<float>", f"{name}<double>") if is_template else (name,):
            lines.append(f"static_assert(sizeof({kind}) == {ctypes.sizeof(structure)});")
            for field, _ in structure._fields_:
                lines.append(f"static_assert(offsetof({kind}, {field}) == {getattr(structure, field).offset});")
    return "\n".join(lines)
