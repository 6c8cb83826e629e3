"""Output on the screen: tables, one progress bar, messages of one line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jacobiflow.progress import Progress

_LONGEST = 300  # characters of a message


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: The line above.
        columns: Headings; a line break keeps a column narrow.
        rows: Cells.
        words: The columns of text, aligned to the left and folded if they are too long; others hold numbers.
        note: Lines below.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = (0,)
    note: str = ""


def show(table: Table) -> None:
    """Prints a table with its title and note."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as Screen

    if table.title:
        print(table.title)
    screen = Screen(box=box.SIMPLE_HEAD, show_edge=False, show_header=any(table.columns), padding=0)
    for i, column in enumerate(table.columns):
        if i in table.words:
            screen.add_column(column, overflow="fold")
        else:
            screen.add_column(column, justify="right", no_wrap=True, min_width=max(map(len, column.split())))
    for row in table.rows:
        screen.add_row(*map(escape, row))
    Console().print(screen)
    if table.note:
        print(table.note)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A `Progress` that draws a bar for each kind of work on a terminal, removed at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        tasks = {}

        def progress(done: int, total: int, what: str) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what)
            bar.update(tasks[what], completed=done, total=total)

        yield progress


def one_line(message: str) -> str:
    """Returns `message` in one line; a long one is cut in the middle, as the remedy stands at its end."""
    line = " ".join(message.split())
    if len(line) <= _LONGEST:
        return line
    half = (_LONGEST - len(" ... ")) // 2
    return f"{line[:half]} ... {line[-half:]}"
