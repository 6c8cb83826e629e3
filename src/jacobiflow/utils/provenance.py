"""The version of the package and the commit that it runs from."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_TIMEOUT = 10  # Seconds after which a call of git, perhaps on a slow disk, is given up.


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The code and the machine that a result comes from; the base of the results of commands.

    Attributes:
        machine: The machine, see `jacobiflow.utils.timing.describe_machine`.
        version: The version of the package.
        commit: The git commit that the package runs from, with "-dirty" if files have changed since; None if it is
            installed without git.
    """

    machine: dict[str, Any]
    version: str = field(default_factory=lambda: find_version())
    commit: str | None = field(default_factory=lambda: find_commit())


def find_version() -> str:
    """Returns the version of the package."""
    from importlib.metadata import version  # Its import would take a tenth of the time of `--help`.

    return version("jacobiflow")


def find_commit() -> str | None:
    """Returns the git commit of the checkout that the package runs from; None if it is installed without git."""
    file = Path(__file__)
    try:
        # The package may be installed in an environment inside another repository, which does not track its files.
        _git(file.parent, "ls-files", "--error-unmatch", file.name)
        return _git(file.parent, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    run = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=_TIMEOUT
    )
    return run.stdout.strip()
