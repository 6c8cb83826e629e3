"""Pages show what result files say: the text between a page's marks is made from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jacobiflow.files import write_atomically


def filled(page: str, parts: Mapping[str, str]) -> str:
    """`page` with the text between the marks of each part replaced."""
    for name, text in parts.items():
        before, _, rest = page.partition(f"<!-- {name} -->")
        _, _, after = rest.partition(f"<!-- end of {name} -->")
        page = f"{before}<!-- {name} -->\n\n{text}\n\n<!-- end of {name} -->{after}"
    return page


def fill(path: Path, parts: Mapping[str, str]) -> None:
    """Fill the page in a file."""
    write_atomically(path, filled(path.read_text(), parts).encode())


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, all but the first column to the right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measured_on(machine: dict[str, Any]) -> str:
    """A line about the machine of a result."""
    processor = f"{machine['cores']} cores of {machine['processor']}"
    return f"Measured on {processor}, {machine['threads']} threads, PyTorch {machine['torch']}."
