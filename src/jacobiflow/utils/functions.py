"""Functions of users, from Python files."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jacobiflow.errors import InputValueError


def load_function(name: str, alternative: str) -> Callable[..., Any]:
    """Runs the file of "FILE.py:FUNCTION", and returns the function; an error that it raises names it.

    Args:
        alternative: What may be given in place of such a name, for an error message.

    Raises:
        InputValueError: If there is no such file or function, or if the file cannot be run.
    """
    file, _, attribute = name.rpartition(":")
    if not file.endswith(".py") or not Path(file).is_file():
        raise InputValueError(
            f"{name}: no such file; give {alternative}, or FILE.py:FUNCTION for a function of your own"
        )
    try:
        function = runpy.run_path(file).get(attribute)
    except Exception as error:  # Running a file can raise anything.
        raise InputValueError(
            f"{name}: the file cannot be run ({type(error).__name__}: {error}); correct it"
        ) from error
    if not callable(function):
        raise InputValueError(f"{name}: no function of this name in the file")

    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            raise InputValueError(f"{name}: the function raised {type(error).__name__} ({error})") from error

    return call
