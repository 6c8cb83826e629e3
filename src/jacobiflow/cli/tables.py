"""Tables on the screen; the pages of `--html` show the same ones."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Screen

from jacobiflow.plots import Table


def show(table: Table) -> None:
    """Print a table with its title and note; cells of words, such as names, are folded where they are too long."""
    print(table.title)
    screen = Screen(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
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
