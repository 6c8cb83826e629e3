"""Recurrences in C++, compiled for the machine at first use."""

from jacobiflow.native.library import compile_library, describe, library
from jacobiflow.native.tensors import pointers, usable

__all__ = ["compile_library", "describe", "library", "pointers", "usable"]
