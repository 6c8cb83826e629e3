"""Kills sampling 20 times, and compares what is left with an undisturbed run: `python benchmarks/crash_test.py`.

Two processes by torchrun draw 4,096 digits. One of them, or the launcher itself, is killed (SIGKILL) at a random moment
after the first shard of the attempt, and the same command is given again; at the end the images must be those of a run
by one process that nobody disturbed, byte for byte. Writes docs/results/crash-test.json; ten minutes on two cores.
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
from contextlib import suppress
from pathlib import Path
from typing import Any

from jacobiflow.files import write_json
from jacobiflow.measuring import machine

RESULT = Path(__file__).resolve().parent.parent / "docs" / "results" / "crash-test.json"
KILLS, NUM, SHARD, BATCH, LONGEST = 20, 4096, 32, 32, 2.0
SAMPLE = [
    "jacobiflow", "sample", "--model", "digits-p1", "--num", str(NUM), "--batch-size", str(BATCH),
    "--shard-size", str(SHARD), "--strategy", "jacobi", "--tolerance", "1e-3",
]  # fmt: skip
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nproc-per-node",
    "2",
    "--standalone",
    "-m",
    "--",
]


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


def shards(out: Path) -> dict[str, bytes]:
    """The images of a folder, shard by shard, that are there as a whole."""
    return {path.stem: path.with_suffix(".npz").read_bytes() for path in sorted((out / "shards").glob("*.json"))}


def attempt(out: Path, delay: float, rng: random.Random) -> dict[str, Any]:
    """Start, or go on; kill after `delay` seconds from the first shard that this attempt adds."""
    before = set(shards(out))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(
        [*TORCHRUN, *SAMPLE, "--out", str(out)], env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    while launcher.poll() is None and len(list((out / "shards").glob("*.json"))) <= len(before):
        time.sleep(0.02)
    time.sleep(delay)
    started = workers(launcher.pid)
    victim = rng.choice([launcher.pid, *started])
    whom = "launcher" if victim == launcher.pid else "worker"
    if launcher.poll() is None:
        os.kill(victim, signal.SIGKILL)
    launcher.wait()
    for worker in started:  # which outlive a launcher that is killed, and would go on
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    after = shards(out)
    left = [path.name for path in (out / "shards").glob("*") if f"{path.stem}.json" not in {f"{s}.json" for s in after}]
    return {
        "killed": whom,
        "seconds": delay,
        "shards_before": len(before),
        "shards_after": len(after),
        "half": len(left),
    }


def main() -> None:
    """Undisturbed, then killed 20 times, then finished."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        calm, storm = Path(folder) / "calm", Path(folder) / "storm"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", *SAMPLE, "--out", str(calm)], env=environment, check=True)
        expected = shards(calm)
        log = []
        for _ in range(KILLS):
            log.append(attempt(storm, rng.uniform(0, LONGEST), rng))
            print(json.dumps(log[-1]), flush=True)
            same = all(expected[name] == data for name, data in shards(storm).items())
            log[-1]["finished_shards_are_right"] = same
            if log[-1]["shards_after"] == len(expected):
                shutil.move(storm, Path(folder) / f"full-{len(log)}")  # start anew, or there is nothing left to kill
        subprocess.run([*TORCHRUN, *SAMPLE, "--out", str(storm)], env=environment, check=True)
        figures = {
            "command": " ".join(SAMPLE), "kills": len(log), "shards": len(expected), "machine": machine(),
            "identical_bytes": shards(storm) == expected, "log": log,
        }  # fmt: skip
    write_json(RESULT, figures)
    print(f"{len(log)} kills, identical bytes: {figures['identical_bytes']}")


if __name__ == "__main__":
    main()
