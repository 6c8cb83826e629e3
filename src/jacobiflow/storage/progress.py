"""How far a run is: a bar on a terminal, a line from time to time elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from jacobiflow.storage.folder import SampleFolder


@contextmanager
def run_progress(
    folder: SampleFolder, todo: Sequence[int], shown: bool = True, every: float = 30.0, processes: int = 1
) -> Iterator[Callable[[float], None]]:
    """Shows how many samples of the shards `todo` are done, by all processes that write to the folder.

    Process i of `processes` draws every one of `todo[i::processes]`, in this order. Without a terminal, a line is
    printed every `every` seconds.

    **Yields** a function to call now and then, with the number of samples that are done of the shard at hand.
    """
    if not shown or not todo:
        yield lambda samples: None
        return
    console = Console(stderr=True)
    columns = (BarColumn(20), TextColumn("{task.description}"), TimeRemainingColumn())
    count, last = _Count(folder, todo, processes), time.perf_counter()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=count.num)

        def update(samples: float) -> None:
            nonlocal last
            done, text = count.update(samples)
            bar.update(task, completed=done, description=text)
            if not console.is_terminal and time.perf_counter() - last > every:
                last = time.perf_counter()
                say(text)

        yield update


class _Count:
    """Counts finished samples by the records that appear in the folder."""

    def __init__(self, folder: SampleFolder, todo: Sequence[int], processes: int) -> None:
        self.num = folder.manifest.num_in(todo)
        self._folder = folder
        self._waiting = [list(reversed(todo[rank::processes])) for rank in range(processes)]
        self._done = self._resolved = 0
        self._began = time.perf_counter()

    def update(self, samples: float) -> tuple[int, str]:
        """How many samples are done, with `samples` of the shard at hand, and a line that says so."""
        for shards in self._waiting:  # only the next shard of each process is looked for
            while shards and (record := self._folder.record(shards[-1])) is not None:
                shards.pop()
                self._done += record.num
                self._resolved += len(record.resolved)
        done = min(self._done + int(samples), self.num)
        rate = done / max(time.perf_counter() - self._began, 1e-9)
        share = f"{self._resolved / self._done:.2%} re-solved" if self._done else "none finished yet"
        return done, f"{done:,} of {self.num:,} samples, {rate:.1f} a second, {share}"


def say(text: str) -> None:
    """Print a line to standard error."""
    print(text, file=sys.stderr)
