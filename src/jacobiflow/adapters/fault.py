"""Faults of an adapter, which leave the module to its library."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from jacobiflow.adapters.library_module import library_class
from jacobiflow.errors import UnsupportedError, first_line

_ISSUES = "https://github.com/jacobiflow/jacobiflow/issues"
EXPECTED = (UnsupportedError, MemoryError, torch.OutOfMemoryError)


@contextmanager
def fault_as_unsupported(module: nn.Module) -> Iterator[None]:
    """Raises UnsupportedError in place of any error that is not `EXPECTED`, and warns of it."""
    try:
        yield
    except EXPECTED:
        raise
    except Exception as error:
        raise UnsupportedError(report_fault(module, error)) from error


def report_fault(module: nn.Module, error: Exception) -> str:
    """Returns the reason why a module is left to its library, and asks the user to report it."""
    reason = f"jacobiflow raised {type(error).__name__}: {first_line(error)}"
    name = library_class(module).__name__
    warnings.warn(f"{name} is left to its library, since {reason}; please report it at {_ISSUES}", stacklevel=4)
    return reason
