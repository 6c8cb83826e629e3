"""Kills commands 20 times, and compares what is left with undisturbed runs: `python benchmarks/crash_test.py`.

Sampling by two processes (torchrun), training, calibrating and comparing are each killed (SIGKILL) five times at a
random moment, and the same command is given again; for sampling one of the processes, or the launcher, is killed. At
the end, what the command promises to be the same must be that of a run that nobody disturbed, byte for byte. Writes
docs/results/crash-test.json; ten minutes on two cores.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from jacobiflow.files import write_json
from jacobiflow.measuring import machine
from jacobiflow.training import read_metrics

RESULT = Path(__file__).resolve().parent.parent / "docs" / "results" / "crash-test.json"
KILLS = 5
PYTHON = [sys.executable, "-m"]
TORCHRUN = [*PYTHON, "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "--"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def shards(out: Path) -> dict[str, Any]:
    """The images of every shard, in all folders of samples, that has its record."""
    found = sorted(out.rglob("shards/*.json"))
    return {str(path.relative_to(out)): path.with_suffix(".npz").read_bytes() for path in found}


def training(out: Path) -> dict[str, Any]:
    """The trained weights, and the metrics of every step without its seconds."""
    steps = [{**step, "seconds": 0} for step in read_metrics(out)] if (out / "metrics.jsonl").is_file() else []
    weights = {}
    if (out / "model.safetensors").is_file():
        weights = {name: tensor.numpy().tobytes() for name, tensor in load_file(out / "model.safetensors").items()}
    return {**{f"step {step['step']}": step for step in steps}, **weights}


def calibration(out: Path) -> dict[str, Any]:
    """The report, or what is finished of it."""
    report = out / "report.json"
    if report.is_file():
        return {report.name: report.read_bytes()}
    return {path.name: path.read_bytes() for path in sorted((out / "report.json.partial").glob("*.json"))}


def steps_of(out: Path) -> int:
    """Steps that the checkpoint holds."""
    file = out / "checkpoint.pt"
    return torch.load(file, weights_only=True)["step"] if file.is_file() else 0


def calibrated(out: Path) -> int:
    """Parts of a calibration that are finished, of which the report has all."""
    return 100 if (out / "report.json").is_file() else len(calibration(out))


@dataclass(frozen=True)
class Job:
    """A command without its output: what it must end with, and how much of its work is finished."""

    command: str
    contents: Callable[[Path], dict[str, Any]]
    finished: Callable[[Path], int]
    out: str = ""  # the file to write, in the job's folder
    shared: bool = False  # by two processes, when it is disturbed

    def words(self, folder: Path, alone: bool = False) -> list[str]:
        """What to run."""
        return [*(TORCHRUN if self.shared and not alone else PYTHON), *self.command.split(),
                "--out", str(folder / self.out)]  # fmt: skip


JOBS = {
    "sample": Job(
        "jacobiflow sample --model digits-p1 --num 2048 --batch-size 32 --shard-size 32 --strategy jacobi "
        "--tolerance 1e-3",
        shards, lambda out: len(shards(out)), shared=True,
    ),
    "train": Job(
        "jacobiflow train --images digits --image-size 8 --patch-size 2 --channels 64 --blocks 4 --steps 200 "
        "--batch-size 32 --no-bf16 --checkpoint-every 20",
        training, steps_of,
    ),
    "calibrate": Job(
        "jacobiflow calibrate --model digits-p1 --images digits --num 64 --traced 8 --chord", calibration, calibrated,
        out="report.json",
    ),
    "compare": Job(
        "jacobiflow compare --model fashion-p2 --strategy jacobi-5 --num 128 --batch-size 16 --shard-size 16 "
        "--repeats 1",
        shards, lambda out: len(shards(out)),
    ),
}  # fmt: skip


def workers(launcher: int) -> list[int]:
    """The processes that torchrun has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == launcher:
            found.append(int(stat.parent.name))
    return sorted(found)


def attempt(job: Job, out: Path, delay: float, rng: random.Random) -> dict[str, Any]:
    """Start, or go on; kill after `delay` seconds, unless it has ended by itself."""
    before = job.finished(out)
    process = subprocess.Popen(
        job.words(out), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    with suppress(subprocess.TimeoutExpired):
        process.wait(delay)
    started = workers(process.pid) if job.shared else []
    victim = rng.choice([process.pid, *started])
    ended = process.poll() is not None
    if not ended:
        os.kill(victim, signal.SIGKILL)
    process.wait()
    for worker in started:  # which outlive a launcher that is killed, and would go on
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    whom = "process" if not started else "launcher" if victim == process.pid else "worker"
    return {
        "killed": None if ended else whom, "seconds": delay, "finished_before": before,
        "finished_after": job.finished(out),
    }  # fmt: skip


def disturbed(name: str, job: Job, place: Path, rng: random.Random) -> dict[str, Any]:
    """An undisturbed run by one process; then runs that are killed at random moments, and finished."""
    calm, storm = place / f"{name}-calm", place / f"{name}-storm"
    began = time.perf_counter()
    subprocess.run(job.words(calm, alone=True), env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    seconds, expected = time.perf_counter() - began, job.contents(calm)
    log: list[dict[str, Any]] = []
    ends: list[dict[str, Any]] = []
    while sum(entry["killed"] is not None for entry in log) < KILLS:
        log.append(attempt(job, storm, rng.uniform(0.2, 0.7) * seconds, rng))
        print(name, json.dumps(log[-1]), flush=True)
        if log[-1]["killed"] is None:  # begun anew, or there is nothing left to kill
            ends.append(job.contents(storm))
            shutil.rmtree(storm)
    subprocess.run(job.words(storm), env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    ends.append(job.contents(storm))
    return {
        "command": job.command,
        "undisturbed_seconds": seconds,
        "kills": KILLS,
        "runs": len(ends),
        "nothing_lost": all(entry["finished_after"] >= entry["finished_before"] for entry in log),
        "identical_bytes": all(end == expected for end in ends),
        "log": log,
    }


def main() -> None:
    """All jobs, two at a time."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        running = {
            name: pool.submit(disturbed, name, job, Path(folder), random.Random(name)) for name, job in JOBS.items()
        }
        found = {name: future.result() for name, future in running.items()}
    write_json(RESULT, {"machine": machine(), "jobs": found})
    for name, job in found.items():
        print(f"{name}: {job['kills']} kills, identical bytes: {job['identical_bytes']}")


if __name__ == "__main__":
    main()
