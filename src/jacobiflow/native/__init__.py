"""Exact recurrences in C++."""

from jacobiflow.native.build import (
    SWITCH,
    TarFlowArguments,
    describe,
    library,
    library_name,
    load_library,
    pointers,
    usable,
)
from jacobiflow.native.compiler import compile_library

__all__ = [
    "SWITCH", "TarFlowArguments", "compile_library", "describe", "library", "library_name", "load_library", "pointers",
    "usable",
]  # fmt: skip
