"""Kills one of three processes that share a command: `python -m benchmarks.kills`.

The moments are spread evenly over the time of the work. The other processes must end without an error, and the folder
must equal that of an undisturbed run. Writes docs/results/kills.json: the rounds, the kills of a process at work, the
rounds that ended equal, and the longest time from a kill to the end in seconds.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.lib.process import finish, start_command
from benchmarks.lib.results import Json, measure_files

MOMENTS, NUM_PROCESSES = 20, 3
COMMANDS = {
    "sample": "sample --model digits-p1 --num 96 --batch-size 4 --shard-size 4 --strategy jacobi",
    "evaluate": "evaluate --model digits-p1 --images digits --test-images 500 --batch-size 16",
    "calibrate": "calibrate --model digits-p1 --images digits --num 64 --batch-size 16 --convergence-samples 8",
}
# Two runs take different times, so the records that hold them have different checksums.
VARYING = re.compile(r"(.*_)?seconds|sha256|commit")


def read_folder(out: Path) -> dict[str, Any]:
    """The content of all files that are not hidden, without what varies."""
    files = {path: path.read_bytes() for path in out.rglob("[!.]*") if path.is_file()}
    return {
        str(path.relative_to(out)): json.loads(data, object_hook=without_times) if path.suffix == ".json" else data
        for path, data in files.items()
    }


def without_times(entries: Json) -> Json:
    return {name: value for name, value in entries.items() if not VARYING.fullmatch(name)}


def kill(line: str, out: Path, victim: int, delay: float) -> tuple[bool, float]:
    """Kills a process so many seconds after the work began; returns if it was alive, and the seconds until the end."""
    processes = [start_command(line, out) for _ in range(NUM_PROCESSES)]
    while not (out / "manifest.json").exists() and any(process.poll() is None for process in processes):
        time.sleep(0.01)
    time.sleep(delay)
    is_alive = processes[victim].poll() is None
    processes[victim].kill()
    killed = time.perf_counter()
    processes.pop(victim).communicate()
    finish(*processes)
    return is_alive, time.perf_counter() - killed


def measure(key: Json) -> Json:
    line, rounds = COMMANDS[key["command"]], []
    with TemporaryDirectory() as folder:
        finish(start_command(line, Path(folder, "alone")))
        expected = read_folder(Path(folder, "alone"))
        _, span = kill(line, Path(folder, "first"), 0, 0.0)  # Two processes do all of the work.
        for moment in range(MOMENTS):
            out, delay = Path(folder, str(moment)), span * moment / MOMENTS
            rounds.append((*kill(line, out, moment % NUM_PROCESSES, delay), read_folder(out) == expected))
    kills, seconds, equal = zip(*rounds, strict=True)
    return {"rounds": MOMENTS, "kills": sum(kills), "equal": sum(equal), "seconds": max(seconds)}


def main() -> None:
    measure_files(__doc__, {"kills": [([{"command": name} for name in COMMANDS], measure)]})


if __name__ == "__main__":
    main()
