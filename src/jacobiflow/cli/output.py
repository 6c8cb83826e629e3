"""Tables, numbers, progress, results as JSON, and errors in one line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from jacobiflow.utils.launch import find_launch

if TYPE_CHECKING:
    from jacobiflow.jobs import CompletedJob, Job
    from jacobiflow.utils.progress import Progress

_MAX_MESSAGE_LENGTH = 300  # Characters.


def show_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], text: Sequence[int] = (0,)) -> None:
    """Prints a table. The columns with indices `text` are aligned to the left, and folded if they are too wide."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, show_header=any(columns), padding=0)
    for i, heading in enumerate(columns):
        if i in text:
            table.add_column(heading, overflow="fold")
        else:
            table.add_column(heading, justify="right", no_wrap=True, min_width=max(map(len, heading.split())))
    for row in rows:
        table.add_row(*(escape(_format_cell(cell)) for cell in row))
    Console().print(table)


def _format_cell(cell: Any) -> str:
    """Formats text, a number, or the mean and standard deviation of one; None is an empty cell."""
    if isinstance(cell, tuple):
        return "±".join(map(_format_cell, cell))
    if isinstance(cell, float):
        return f"{cell:.1e}" if 1e4 <= cell < float("inf") else f"{cell:.2f}"
    return "" if cell is None else str(cell)


def format_duration(seconds: float) -> str:
    """Formats a duration in seconds, minutes or hours.

    Example:
        >>> format_duration(42), format_duration(600), format_duration(9000)
        ('42 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def format_count(num: int, noun: str) -> str:
    """Formats a number of things.

    Example:
        >>> format_count(1, "thread"), format_count(1200, "sample")
        ('1 thread', '1,200 samples')
    """
    return f"{num:,} {noun}{'s' * (num != 1)}"


def format_rate(num: int, seconds: float) -> str:
    """Formats how many of `num` things are done in a second.

    Example:
        >>> format_rate(14_300, 10), format_rate(1, 4)
        ('1,430', '0.25')
    """
    rate = num / seconds
    return f"{rate:,.0f}" if rate >= 9.95 else f"{rate:.2g}"


def format_speed_up(speed_up: float) -> str:
    """Formats how many times faster or slower something is.

    Example:
        >>> format_speed_up(25.3), format_speed_up(0.4)
        ('25x faster', '2.5x slower')
    """
    factor, word = (speed_up, "faster") if speed_up >= 1 else (1 / speed_up, "slower")
    return f"{factor:.{1 if factor < 10 else 0}f}x {word}"


@contextmanager
def progress_bar() -> Iterator[Progress | None]:
    """Yields a `Progress` that draws a bar for each kind of work; without a terminal, once a minute.

    Of the processes that a launcher has started, the first one draws it; the others get None.
    """
    if find_launch().rank > 0:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console, printed = Console(stderr=True), monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    bars, tasks = Bars(*columns, console=console, transient=True), {}
    with bars if console.is_terminal else nullcontext():

        def progress(done: int, total: int, what: str) -> None:
            nonlocal printed
            if what not in tasks:
                tasks[what] = bars.add_task(what)
            bars.update(tasks[what], completed=done, total=total)
            if not console.is_terminal and monotonic() - printed >= 60:
                console.print(bars)
                printed = monotonic()

        yield progress


def run_job(job: Job, out: Path, overwrite: bool = False) -> CompletedJob | None:
    """Runs a job with a progress bar, and names its file; returns None if another process reports the result."""
    from jacobiflow import jobs

    with progress_bar() as progress:
        completed = jobs.run(job, out, overwrite=overwrite, progress=progress)
    new = "was there already:" if completed.was_complete else "wrote"
    print(f"{new if completed.should_print else 'another process wrote'} {out / job.result_name}")
    return completed if completed.should_print else None


def to_json(value: Any) -> Any:
    """Returns the JSON value of a config or a result; a class may have a method `to_json` of its own."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if is_dataclass(value):
        return {entry.name: to_json(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, list | tuple):
        return [to_json(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def one_line(message: str) -> str:
    """Returns a message in one line. A long one is cut in the middle, since the remedy stands at its end."""
    line, half = " ".join(message.split()), (_MAX_MESSAGE_LENGTH - len(" ... ")) // 2
    return line if len(line) <= _MAX_MESSAGE_LENGTH else f"{line[:half]} ... {line[-half:]}"
