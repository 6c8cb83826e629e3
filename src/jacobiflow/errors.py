"""Errors that a caller can correct, told apart from faults of the library."""

from __future__ import annotations


class InputError(Exception):
    """Base class of the errors that a caller can correct: a wrong argument, option, file or folder.

    The message names the value and the remedy. Every other exception is a fault of the library or of the machine.
    """


class InputTypeError(InputError, TypeError):
    """An argument is of the wrong kind."""


class InputValueError(InputError, ValueError):
    """An argument is of the right kind and has a wrong value."""
