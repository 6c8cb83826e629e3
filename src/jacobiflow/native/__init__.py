"""Recurrences in C++."""

from jacobiflow.native.build import (
    SWITCH,
    TarFlowArguments,
    describe,
    library,
    library_name,
    load_library,
)
from jacobiflow.native.compiler import compile_library
from jacobiflow.native.tensors import pointers, usable

__all__ = [
    "SWITCH", "TarFlowArguments", "compile_library", "describe", "library", "library_name",
    "load_library", "pointers", "usable",
]  # fmt: skip
