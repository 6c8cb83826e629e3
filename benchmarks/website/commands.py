"""The page of the command line, from the help of every command."""

from __future__ import annotations

import re
import subprocess
import sys


def markdown_of_commands() -> str:
    """Returns the help of every command as Markdown."""
    command = [sys.executable, "-m", "typer", "jacobiflow.cli.app", "utils", "docs", "--name", "jacobiflow"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    text = text.replace("# `jacobiflow`", "# Command line", 1)
    text = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+\n", "", text)  # whose descriptions are cut; their sections follow
    text = re.sub(
        r"^(Example|Examples): (.*?)\n\n", r"\1:\n\n```console\n\2\n```\n\n", text, flags=re.DOTALL | re.MULTILINE
    )
    return re.sub(r"^\*\*(\w+)\*\*:", r"\1:", text, flags=re.MULTILINE)
