"""Measures runs of several processes: `python -m benchmarks.clusters`, about forty minutes on two cores.

Two processes with the variables of SLURM's srun, on this machine, against one: the differences of trained weights,
losses, scores and reports, the share of the work of each process, and what happens if one of them is killed at twenty
moments of each command. Writes docs/results/clusters.json, which fills docs/clusters.md; interrupted, it goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file

from benchmarks.common import RESULTS, Json, complete, parser
from jacobiflow.training import read_metrics

MOMENTS = 20
LIMIT = 60  # Seconds in which the other process must end.
STEPS = 50
FLOW = "--images digits --image-size 8 --channels 32 --head-dim 16 --blocks 2 --layers 2"
TRAIN = f"train {FLOW} --batch-size 12 --warmup 4 --no-bf16 --steps {STEPS} --sample-every 1000000000"


@dataclass(frozen=True)
class Command:
    """A command, and what must be the same whoever runs it: numbers, or the checksum of bytes."""

    line: str
    read: Callable[[Path], Json]


def samples(out: Path) -> Json:
    return {"checksums": json.loads((out / "manifest.json").read_bytes())["checksums"]}


def scores(out: Path) -> Json:
    return numbers(json.loads((out / "evaluation.json").read_bytes()), ("seconds", "commit", "processes"))


def report(out: Path) -> Json:
    return numbers(json.loads((out / "report.json").read_bytes()), ())


def losses(out: Path) -> Json:
    return {str(metrics.step): metrics.loss for metrics in read_metrics(out)}


def numbers(value: Json | list[object] | object, left_out: tuple[str, ...], name: str = "") -> Json:
    """All numbers in a JSON value, by their places."""
    if isinstance(value, dict):
        entries = [(f"{name}.{key}", entry) for key, entry in value.items() if key not in left_out]
    elif isinstance(value, list):
        entries = [(f"{name}[{i}]", entry) for i, entry in enumerate(value)]
    else:
        return {name: value} if isinstance(value, int | float) and not isinstance(value, bool) else {}
    return {place: number for key, entry in entries for place, number in numbers(entry, left_out, key).items()}


COMMANDS = {
    "sample": Command(
        "sample --model digits-p1 --num 256 --batch-size 4 --shard-size 4 --strategy jacobi --out {out}", samples
    ),
    "evaluate": Command(
        "evaluate --model digits-p1 --images digits --test-images 1500 --batch-size 16 --out {out}", scores
    ),
    "calibrate": Command(
        "calibrate --model digits-p1 --images digits --num 256 --batch-size 16 --out {out}/report.json", report
    ),
    "train": Command(f"{TRAIN} --checkpoint-every 5 --out {{out}}", losses),
}


def start(line: str, count: int) -> list[subprocess.Popen[str]]:
    """Starts processes as srun does, without `--kill-on-bad-exit`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        "SLURM_STEP_NUM_TASKS": str(count), "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-m", "jacobiflow", *line.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip


def run(line: str, count: int) -> float:
    """Runs a command to its end, and returns the seconds."""
    started = time.perf_counter()
    processes = start(line, count)
    outputs = [process.communicate() for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    return time.perf_counter() - started


def difference(mine: Json, other: Json) -> float:
    """The largest relative difference of two sets of numbers; infinity if one is missing, or bytes differ."""
    if mine.keys() != other.keys() or "checksums" in mine:
        return 0.0 if mine == other else float("inf")
    return max(abs(mine[name] - other[name]) / max(abs(other[name]), 1.0) for name in other)


def compare(name: str, folder: Path) -> Json:
    """Two processes against one: the largest difference of the results."""
    command = COMMANDS[name]
    results, seconds = {}, {}
    for count in (1, 2):
        out = folder / f"{name}-{count}"
        seconds[count] = run(command.line.format(out=out), count)
        results[count] = command.read(out)
    return {"difference": difference(results[2], results[1]), "seconds": [seconds[1], seconds[2]]}


def kill(name: str, folder: Path) -> Json:
    """Kills each process in turn at moments between the start of the work and its end, and resumes."""
    command = COMMANDS[name]
    whole = folder / f"{name}-whole"
    processes, begun = start(command.line.format(out=whole), 2), 0.0
    started = time.perf_counter()
    while any(process.poll() is None for process in processes):
        time.sleep(0.01)
        if not begun and whole.exists():
            begun = time.perf_counter() - started
    span = time.perf_counter() - started - begun
    for process in processes:
        process.communicate()
    want, runs = command.read(whole), []
    for moment in range(MOMENTS):
        out = folder / f"{name}-{moment}"
        processes, victim = start(command.line.format(out=out), 2), moment % 2
        while not out.exists() and processes[victim].poll() is None:
            time.sleep(0.01)
        time.sleep(span * moment / MOMENTS)
        was_alive = processes[victim].poll() is None
        processes[victim].send_signal(signal.SIGKILL)
        killed = time.perf_counter()
        try:
            _, errors = processes[1 - victim].communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            processes[1 - victim].kill()
            _, errors = processes[1 - victim].communicate()
        seconds = time.perf_counter() - killed
        processes[victim].communicate()
        messages = sum(line.startswith("error: ") for line in errors.splitlines())
        ended_well = processes[1 - victim].returncode == 0
        run(command.line.format(out=out), 2)
        runs.append((was_alive, ended_well, seconds, messages, difference(command.read(out), want)))
        print(name, moment, *runs[-1], flush=True)
        shutil.rmtree(out)
    killed_runs = [each for each in runs if each[0] and not each[1]]
    return {
        "moments": MOMENTS, "killed_at_work": len(killed_runs),
        "seconds": max((each[2] for each in killed_runs), default=0.0),
        "messages": sorted({each[3] for each in killed_runs}), "difference": max(each[4] for each in runs),
    }  # fmt: skip


def train(key: Json, folder: Path) -> Json:
    """Weights and losses after the steps, against one process. Attention does not depend on the biases of keys."""
    options = {"replicated": "", "sharded": "--shard"}[key["training"]]
    one, two = folder / "one", folder / "two"
    seconds = [run(f"{TRAIN} --out {one}", 1), run(f"{TRAIN} {options} --out {two}", 2)]
    mine, other = (load_file(out / "model.safetensors") for out in (two, one))
    return {
        "seconds": seconds,
        "training_seconds": [read_metrics(out)[-1].seconds for out in (one, two)],
        "loss": max(abs(a.loss - b.loss) for a, b in zip(read_metrics(two), read_metrics(one), strict=True)),
        "weights": max(float((mine[name] - other[name]).abs().max()) for name in mine if "qkv.bias" not in name),
        "all_weights": max(float((mine[name] - other[name]).abs().max()) for name in mine),
    }


def measure(key: Json) -> Json:
    with TemporaryDirectory() as folder:
        if "training" in key:
            return train(key, Path(folder))
        return (compare if "command" in key else kill)(key.get("command") or key["killed"], Path(folder))


def keys() -> Iterator[Json]:
    for training in ("replicated", "sharded"):
        yield {"training": training}
    for name in COMMANDS:
        yield {"command": name}
    for name in COMMANDS:
        yield {"killed": name}


if __name__ == "__main__":
    parser(__doc__).parse_args()
    complete(RESULTS / "clusters.json", keys(), measure)
