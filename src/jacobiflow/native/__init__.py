"""Exact inverses of blocks and masked flows in C++."""

from jacobiflow.native.library import SWITCH, describe, library_name, load_library, usable_library

__all__ = ["SWITCH", "describe", "library_name", "load_library", "usable_library"]
