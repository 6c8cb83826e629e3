"""An extension of Griffe, by which mkdocstrings shows `Example:` sections of docstrings as code."""

from __future__ import annotations

from typing import Any

import griffe


class Examples(griffe.Extension):
    """Gives `Example:` sections the name that Griffe knows."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
