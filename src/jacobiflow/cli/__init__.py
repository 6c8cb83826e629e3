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

        install = "pip install 'jacobiflow[cli] @ git+https://github.com/jacobiflow/jacobiflow'"
        print(f"error: the command line needs more packages: {install}", file=sys.stderr)
        return 2


__all__ = ["main"]
