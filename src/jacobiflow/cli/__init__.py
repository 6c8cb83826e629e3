"""The command line: `jacobiflow` or `python -m jacobiflow`."""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> None:
    """Runs a command line, see `jacobiflow.cli.app.main`; says what to install if its packages are missing."""
    try:
        from jacobiflow.cli.app import main as run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print("error: the command line needs more packages: pip install 'jacobiflow[cli]'", file=sys.stderr)
        sys.exit(2)
    run(arguments)
