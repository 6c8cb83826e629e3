"""Recurrences in C++, compiled for the machine at first use."""

from jacobiflow.native.build import SWITCH, compile_library, describe, library, load_library
from jacobiflow.native.tensors import pointers, usable

__all__ = ["SWITCH", "compile_library", "describe", "library", "load_library", "pointers", "usable"]
