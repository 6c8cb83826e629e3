"""Measures runs of two processes beside one: `python -m benchmarks.clusters`, about five minutes on two cores.

torchrun starts the processes on this machine, with a thread each. Writes docs/results/clusters.json, which fills
docs/clusters.md: the largest differences of results, trained weights and losses, and the seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from benchmarks.lib.results import Json, complete, parser
from jacobiflow.training import read_metrics

COUNTS = (1, 2)
FLOW = "--images digits --image-size 8 --channels 32 --head-dim 16 --blocks 2 --layers 2"
TRAIN = f"train {FLOW} --batch-size 12 --warmup 4 --no-bf16 --steps 50 --sample-every 1000000000 --out {{out}}"
THROUGHPUT = "train --images fashion-512 --channels 128 --blocks 4 --layers 2 --no-bf16 --steps 20 --out {out}"
# A command, and the files whose numbers are compared.
COMMANDS = {
    "sample": (
        "sample --model digits-p1 --num 96 --batch-size 4 --shard-size 4 --strategy jacobi --out {out}",
        "shards/*.npz",
    ),
    "evaluate": (
        "evaluate --model digits-p1 --images digits --test-images 500 --batch-size 16 --out {out}", "evaluation.json"
    ),
    "calibrate": (
        "calibrate --model digits-p1 --images digits --num 64 --batch-size 16 --convergence-samples 8 --out {out}",
        "report.json",
    ),
    "train": (TRAIN, "model.safetensors"),
}  # fmt: skip
NOT_COMPARED = ("seconds", "commit", "processes")
TRAININGS = {"replicated": "", "sharded": "--shard"}


def run(line: str, count: int, out: Path) -> float:
    """Runs a command in a number of processes, and returns the seconds."""
    launcher = (
        ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m", "--"] if count > 1 else []
    )
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", *launcher, "jacobiflow", *line.format(out=out).split()],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    return time.perf_counter() - started


def numbers(path: Path) -> dict[str, Any]:
    """The arrays in a file of tensors, or the numbers in a JSON file, by name."""
    if path.suffix == ".json":
        return dict(_numbers(json.loads(path.read_bytes()), ""))
    return load_file(path) if path.suffix == ".safetensors" else dict(np.load(path))


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            if key not in NOT_COMPARED:
                yield from _numbers(entry, f"{name}/{key}")
    elif isinstance(value, int | float):
        yield name, value


def difference(mine: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of an entry, over the larger of 1 and the entry."""
    assert mine.keys() == other.keys()
    pairs = [(np.asarray(mine[name], float), np.asarray(other[name], float)) for name in other]
    return max(float((np.abs(a - b) / np.maximum(np.abs(b), 1)).max(initial=0)) for a, b in pairs if a.size)


def measure(key: Json) -> Json:
    """Seconds of a command in one process and in two, and the differences of what they write."""
    with TemporaryDirectory() as folder:
        outs = [Path(folder) / str(count) for count in COUNTS]
        if "throughput" in key:
            for count, out in zip(COUNTS, outs, strict=True):
                run(THROUGHPUT, count, out)
            one, two = (read_metrics(out)[-1].seconds for out in outs)
            return {"training_seconds": [one, two], "speed_up": one / two}
        if "training" in key:
            seconds = [run(TRAIN, 1, outs[0]), run(f"{TRAIN} {TRAININGS[key['training']]}", 2, outs[1])]
            losses = [{str(metrics.step): metrics.loss for metrics in read_metrics(out)} for out in outs]
            # Attention does not depend on the biases of keys.
            weights = [
                {name: tensor for name, tensor in numbers(out / "model.safetensors").items() if "qkv.bias" not in name}
                for out in outs
            ]
            return {"seconds": seconds, "loss": difference(*losses), "weights": difference(*weights)}
        line, files = COMMANDS[key["command"]]
        seconds = [run(line, count, out) for count, out in zip(COUNTS, outs, strict=True)]
        names = [path.relative_to(outs[0]) for path in outs[0].glob(files)]
        return {
            "seconds": seconds,
            "difference": max(difference(*(numbers(out / name) for out in outs)) for name in names),
        }


def keys() -> Iterator[Json]:
    for training in TRAININGS:
        yield {"training": training}
    for name in COMMANDS:
        yield {"command": name}
    yield {"throughput": "fashion"}


def main() -> None:
    parser(__doc__).parse_args()
    complete("clusters", keys(), measure)


if __name__ == "__main__":
    main()
