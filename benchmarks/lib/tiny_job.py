"""A job of tiny units, which processes share: `python -m benchmarks.lib.tiny_job FOLDER NUM_UNITS NUM_PROCESSES`.

Prints the seconds from the start of the first process to the end of the last one, as JSON: for a new folder, and for
the finished one. It imports nothing else of the benchmarks, so that it runs on any version of the package.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jacobiflow.jobs import Job, JobStore, Unit, UnitOutput, run
from jacobiflow.utils.progress import Progress


@dataclass(frozen=True)
class Spec:
    """The number of units."""

    num_units: int


class TinyJob(Job):
    """Each unit writes a file of 4 kB."""

    kind, result_name, machine = "samples", "outcome.json", {"processor": "any"}

    def __init__(self, num_units: int) -> None:
        self.spec = Spec(num_units)

    def stages(self, store: JobStore) -> Iterator[list[Unit]]:
        """Yields all units."""
        yield [Unit(f"shard-{index:05}", partial(compute, index)) for index in range(self.spec.num_units)]

    def reduce(self, store: JobStore) -> Any:
        """Returns nothing."""
        return {}


def compute(index: int, progress: Progress | None) -> UnitOutput:
    """Returns the output of a unit."""
    return UnitOutput({f"shards/{index:05}.npz": bytes(4096)})


def measure(folder: Path, num_units: int, num_processes: int) -> float:
    """Returns the seconds in which processes complete the job in a folder."""
    processes = multiprocessing.get_context("fork")
    barrier = processes.Barrier(num_processes + 1)
    workers = [
        processes.Process(target=lambda: (barrier.wait(), run(TinyJob(num_units), folder)))
        for _ in range(num_processes)
    ]
    for worker in workers:
        worker.start()
    barrier.wait()
    started = time.perf_counter()
    for worker in workers:
        worker.join()
        assert not worker.exitcode
    return time.perf_counter() - started


if __name__ == "__main__":
    path, *numbers = sys.argv[1:]
    measure_folder = partial(measure, Path(path), *map(int, numbers))
    print(json.dumps({"new": measure_folder(), "finished": measure_folder()}))
