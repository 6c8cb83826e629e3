"""Warnings at the line that has called the package."""

import sys
import warnings


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the line that has called the package."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "jacobiflow":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
