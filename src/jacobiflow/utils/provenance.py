"""The version of the package and the machine of a result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def find_version() -> str:
    """Returns the version of the package."""
    from importlib.metadata import version  # `--help` does not need it.

    return version("jacobiflow")


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The code and the machine that a result comes from; the base of the results of commands.

    Attributes:
        machine: The machine, see `jacobiflow.utils.timing.describe_machine`.
        version: The version of the package.
    """

    machine: dict[str, Any]
    version: str = field(default_factory=find_version)
