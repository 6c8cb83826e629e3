"""Measures training in two processes beside one: `python -m benchmarks.clusters`.

torchrun starts the processes on this machine, with a thread each. Writes docs/results/clusters.json, which fills
docs/many_samples.md: the largest differences of losses and trained weights, and the speed-up.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.lib.process import finish, start_command
from benchmarks.lib.results import Json, measure_files
from jacobiflow.training import read_metrics

FLOW = "--images digits --image-size 8 --width 32 --head-dim 16 --blocks 2 --layers 2"
TRAIN = f"train {FLOW} --batch-size 12 --warmup 4 --no-bf16 --steps 50 --sample-every 1000000000"
THROUGHPUT = "train --images fashion-512 --width 128 --blocks 4 --layers 2 --no-bf16 --steps 20"
TRAININGS = {"replicated": "", "sharded": "--shard"}
KEYS: list[Json] = [*({"training": name} for name in TRAININGS), {"throughput": "fashion"}]


def run(line: str, out: Path, num_processes: int = 1) -> None:
    """Runs a command in a number of processes."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes), "-m", "--"]
    finish(start_command(line, out, torchrun if num_processes > 1 else []))


def difference(one: Tensor, two: Tensor) -> float:
    """The largest difference of an entry, over the larger of 1 and the entry."""
    return float(((one - two).abs() / two.abs().clamp(min=1)).max())


def losses(out: Path) -> Tensor:
    return torch.tensor([metrics.loss for metrics in read_metrics(out)], dtype=torch.float64)


def measure(key: Json) -> Json:
    """The differences of a training in two processes from one in one process, or the speed-up of a larger one."""
    with TemporaryDirectory() as folder:
        one, two = Path(folder, "1"), Path(folder, "2")
        if "throughput" in key:
            run(THROUGHPUT, one)
            run(THROUGHPUT, two, num_processes=2)
            seconds = [read_metrics(out)[-1].seconds for out in (one, two)]
            return {"training_seconds": seconds, "speed_up": seconds[0] / seconds[1]}
        run(TRAIN, one)
        run(f"{TRAIN} {TRAININGS[key['training']]}", two, num_processes=2)
        weights, others = (load_file(out / "model.safetensors") for out in (one, two))
        # Attention does not depend on the biases of keys.
        names = [name for name in weights if "qkv.bias" not in name]
        return {
            "loss": difference(losses(one), losses(two)),
            "weights": max(difference(weights[name], others[name]) for name in names),
        }


def main() -> None:
    measure_files(__doc__, {"clusters": [(KEYS, measure)]})


if __name__ == "__main__":
    main()
