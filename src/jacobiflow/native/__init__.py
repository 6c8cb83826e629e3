"""Exact recurrences in C++."""

from jacobiflow.native.build import SWITCH, describe, library, library_name, usable_library

__all__ = ["SWITCH", "describe", "library", "library_name", "usable_library"]
