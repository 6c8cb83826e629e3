"""Compares the plans of two versions of the library: `python -m benchmarks.plan_speed FOLDER`.

FOLDER is a checkout of the other version. A process of each version plans for itself; then both sample the same latents
in turn, with and without native code. Prints the median ratio of this version's seconds to the other's.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT

MODELS = ("fashion-p2", "emoji-p2", "digits-p1", "digits-maf")
BATCHES = (1, 4, 16, 64)
ROUNDS = 5
WORKER = """
import sys, time
import torch
import jacobiflow as jf

name, batch = sys.argv[1], int(sys.argv[2])
flow = jf.load(name)
labels = torch.arange(batch) % flow.config.num_classes if flow.config.num_classes else None
started = time.perf_counter()
plan = jf.strategy.auto(flow, batch)
print(time.perf_counter() - started, flush=True)
for line in sys.stdin:
    started = time.perf_counter()
    jf.sample(flow, batch, labels, seed=int(line), strategy=plan)
    print(time.perf_counter() - started, flush=True)
"""


def start(folder: Path, cache: str, name: str, batch: int, native: bool) -> subprocess.Popen[str]:
    """Starts a process that plans, and samples a batch for each seed that it reads."""
    environment = {"PYTHONPATH": str(folder / "src"), "XDG_CACHE_HOME": cache}
    if not native:
        environment["JACOBIFLOW_NATIVE"] = "0"
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, name, str(batch)], env=os.environ | environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def answer(worker: subprocess.Popen[str]) -> float:
    """The next number that a process prints."""
    assert worker.stdout is not None
    return float(worker.stdout.readline())


def compare(other: Path, name: str, batch: int, native: bool) -> dict[str, Any]:
    """Seconds of planning and of a batch by both versions, and the ratio of the latter."""
    with tempfile.TemporaryDirectory() as cache:
        planning: list[float] = []
        seconds: tuple[list[float], list[float]] = ([], [])
        workers: list[subprocess.Popen[str]] = []
        for folder in (other, ROOT):  # one after the other: a busy machine spoils a plan
            worker = start(folder, f"{cache}/{len(workers)}", name, batch, native)
            planning.append(answer(worker))
            workers.append(worker)
        for seed in range(ROUNDS + 1):
            for worker, times in zip(workers, seconds, strict=True):
                print(seed, file=worker.stdin, flush=True)
                times.append(answer(worker))
        for worker in workers:
            worker.communicate()
    # A batch of each seed takes another time. The first round warms up.
    ratio = statistics.median(this / before for before, this in list(zip(*seconds, strict=True))[1:])
    return {"ratio": ratio, "planning": planning, "seconds": [min(times) for times in seconds]}


if __name__ == "__main__":
    for model, native, batch in product(MODELS, (True, False), BATCHES):
        row = compare(Path(sys.argv[1]).resolve(), model, batch, native)
        print(f"{model}, batch {batch}, native {native}: {json.dumps(row)}", flush=True)
