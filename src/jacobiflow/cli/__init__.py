"""The command line: `jacobiflow` or `python -m jacobiflow`."""

from __future__ import annotations

from collections.abc import Sequence

try:
    from jacobiflow.cli.app import main
except ModuleNotFoundError as missing:
    if missing.name != "cyclopts":
        raise

    def main(arguments: Sequence[str] | None = None) -> int:
        """Prints which packages the command line needs, and returns the exit code 2."""
        import sys

        print("error: the command line needs more packages: pip install 'jacobiflow[cli]'", file=sys.stderr)
        return 2


__all__ = ["main"]
