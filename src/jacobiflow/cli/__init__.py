"""The command line: `jacobiflow` or `python -m jacobiflow`."""

from jacobiflow.cli.app import app, main

__all__ = ["app", "main"]
