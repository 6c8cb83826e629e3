"""Measures runs of several processes: `python -m benchmarks.clusters`, about forty minutes on two cores.

Two processes with the variables of SLURM's srun, on this machine, against one: the differences of trained weights,
losses, scores and reports, the share of the work of each process, and what happens if one of them is killed at
twenty moments of each command. Writes docs/results/clusters.json, which fills docs/clusters.md.
"""

from __future__ import annotations

import json
import os
import re
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
from benchmarks.sources import ROOT
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
        "sample --model digits-p1 --num 96 --batch-size 4 --shard-size 4 --strategy jacobi --out {out}", samples
    ),
    "evaluate": Command(
        "evaluate --model digits-p1 --images digits --test-images 500 --batch-size 16 --out {out}", scores
    ),
    "calibrate": Command(
        "calibrate --model digits-p1 --images digits --num 64 --batch-size 16 --convergence-samples 8 --out {out}",
        report,
    ),
    "train": Command(f"{TRAIN} --checkpoint-every 5 --out {{out}}", losses),
}


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start(line: str, count: int) -> list[subprocess.Popen[str]]:
    """Starts processes as srun does, without `--kill-on-bad-exit`."""
    shared = {
        "SLURM_STEP_NUM_TASKS": str(count), "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1",
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


# Programs that stand for those of SLURM: `srun` starts two tasks as SLURM does, and sends them its signals.
PROGRAMS = {
    "srun": """#!{python}
import os, signal, subprocess, sys
command = [word for word in sys.argv[1:] if not word.startswith("--kill-on-bad-exit")]
count = int(os.environ["TASKS"])
shared = os.environ | {{
    "SLURM_STEP_NUM_TASKS": str(count), "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost",
    "OMP_NUM_THREADS": "1",
}}
tasks = [
    subprocess.Popen(command, env=shared | {{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}}) for i in range(count)
]
open("srun.pid", "w").write(str(os.getpid()))
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
""",
    "scontrol": '#!/bin/sh\necho "$@" >> requeued\n',
    "jacobiflow": '#!/bin/sh\nexec {python} -m jacobiflow "$@"\n',
    "torchrun": '#!/bin/sh\nexec {python} -m torch.distributed.run "$@"\n',
}
SMALLER = (
    ("--num 50000", "--num 24 --batch-size 2 --shard-size 2"), ("--model photos", "--model digits-p1"),
    ("--nproc-per-node 8", "--nproc-per-node 1"), ("node1:29500", "localhost:{port}"),
    ("--images photos --image-size 32 --image-channels 3", f"{FLOW} --batch-size 12 --no-bf16 --sample-every 100000"),
    ("--steps 200000", "--steps 400"), ("/16", "/3"),
)  # fmt: skip


def scripts() -> dict[str, str]:
    """The scripts of the page, made smaller, by their names."""
    page = (ROOT / "docs/clusters.md").read_text()
    blocks = re.findall(r"^```(?:sh)?\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    for old, new in SMALLER:
        blocks = [block.replace(old, new) for block in blocks]
    _, machines, srun, requeue, array = blocks
    return {"two machines": machines, "srun": srun, "requeue": requeue, "array": array}


def recipe(name: str, folder: Path) -> Json:
    """Runs a script of the page. The results are those of one process, which this function checks."""
    programs = folder / "bin"
    programs.mkdir()
    for program, text in PROGRAMS.items():
        (programs / program).write_text(text.format(python=sys.executable))
        (programs / program).chmod(0o755)
    script = scripts()[name].replace("{port}", free_port())
    variables = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "12", "TASKS": "2"}

    def begin(**others: str) -> subprocess.Popen[str]:
        port = {"MASTER_PORT": free_port()}
        return subprocess.Popen(
            ["bash", "-c", script], cwd=folder, env=os.environ | variables | port | others, text=True
        )  # fmt: skip

    started = time.perf_counter()
    if name == "two machines":
        jobs = [begin(), begin()]
        assert [job.wait() for job in jobs] == [0, 0]
    elif name == "array":
        for part in ("2", "1", "3"):
            assert begin(SLURM_ARRAY_TASK_ID=part, TASKS="1").wait() == 0
    elif name == "requeue":
        job, metrics = begin(), folder / "runs/photos/metrics.jsonl"
        while not metrics.exists():
            time.sleep(0.05)
        os.kill(int((folder / "srun.pid").read_text()), signal.SIGUSR1)
        job.wait()
        assert (folder / "requeued").read_text() == "requeue 12\n"
        assert begin().wait() == 0
        assert [each.step for each in read_metrics(folder / "runs/photos")] == list(range(1, 401))
    else:
        assert begin().wait() == 0
    seconds = time.perf_counter() - started
    if name != "requeue":
        alone = folder / "alone"
        run(f"sample --model digits-p1 --num 24 --batch-size 2 --shard-size 2 --out {alone}", 1)
        assert samples(folder / "out/many") == samples(alone)
    return {"seconds": seconds}


def throughput(folder: Path) -> Json:
    """Seconds of training by one process and by two, on one core each."""
    line = "train --images fashion-512 --channels 128 --blocks 4 --layers 2 --no-bf16 --steps 20 --out "
    seconds = []
    for count in (1, 2):
        run(f"{line}{folder}/{count}", count)
        seconds.append(read_metrics(folder / str(count))[-1].seconds)
    return {"training_seconds": seconds, "speed_up": seconds[0] / seconds[1]}


def measure(key: Json) -> Json:
    with TemporaryDirectory() as folder:
        if "recipe" in key:
            return recipe(key["recipe"], Path(folder))
        if "throughput" in key:
            return throughput(Path(folder))
        if "training" in key:
            return train(key, Path(folder))
        return (compare if "command" in key else kill)(key.get("command") or key["killed"], Path(folder))


def keys() -> Iterator[Json]:
    for name in scripts():
        yield {"recipe": name}
    for training in ("replicated", "sharded"):
        yield {"training": training}
    for name in COMMANDS:
        yield {"command": name}
    yield {"throughput": "fashion"}
    for name in COMMANDS:
        yield {"killed": name}


def main() -> None:
    parser(__doc__).parse_args()
    complete(RESULTS / "clusters.json", keys(), measure)


if __name__ == "__main__":
    main()
