"""Output on the screen: tables, one progress bar, messages of one line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jacobiflow.progress import Progress

_LONGEST = 300  # characters of a message


def show_table(columns: Iterable[str], rows: Iterable[Sequence[str]], text: Sequence[int] = (0,)) -> None:
    """Prints a table. The columns `text` are aligned to the left, and folded if they are too long."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    headings = list(columns)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, show_header=any(headings), padding=0)
    for i, heading in enumerate(headings):
        if i in text:
            table.add_column(heading, overflow="fold")
        else:
            table.add_column(heading, justify="right", no_wrap=True, min_width=max(map(len, heading.split())))
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A `Progress` that draws a bar for each kind of work on a terminal, removed at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        tasks = {}

        def progress(done: int, total: int, what: str) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what)
            bars.update(tasks[what], completed=done, total=total)

        yield progress


def one_line(message: str) -> str:
    """Returns `message` in one line; a long one is cut in the middle, as the remedy stands at its end."""
    line = " ".join(message.split())
    if len(line) <= _LONGEST:
        return line
    half = (_LONGEST - len(" ... ")) // 2
    return f"{line[:half]} ... {line[-half:]}"
