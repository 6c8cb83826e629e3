"""Exact recurrences in C++."""

from jacobiflow.native.build import SWITCH, TarFlowArguments, describe, library, library_name, pointers, usable

__all__ = ["SWITCH", "TarFlowArguments", "describe", "library", "library_name", "pointers", "usable"]
