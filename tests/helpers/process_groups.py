"""Command lines that several real processes run together, as torchrun or srun starts them; some kill themselves.

A driver imports the package once and forks each process, since an import takes seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jacobiflow as jf

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Job:
    """Processes that run one command line.

    Attributes:
        line: The command line; or "python" and a program, in which `rank` is the number of the process.
        ranks: Number of processes.
        kills: The file, counted from 1, at whose renaming a rank kills itself.
        name: Names the files of the outputs.
        launcher: "torchrun" or "srun".
    """

    line: Sequence[str]
    ranks: int = 2
    kills: dict[int, int] | None = None
    name: str = "job"
    launcher: str = "torchrun"


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: The exit code; -9 if it was killed.
        seconds: Seconds after the start of its round.
        claimed: Number of units that it claimed.
    """

    code: int
    out: str
    err: str
    seconds: float
    claimed: int


def run_jobs(rounds: Sequence[Sequence[Job]], folder: Path, speed: float = 4) -> list[dict[str, list[Ended]]]:
    """Runs the jobs of a round side by side in `folder`, round after round; returns how their ranks ended by name.

    Signs of life, and the waits of processes that end, are `speed` times as fast as for a user.
    """
    plan = [[{**vars(job), "line": [*job.line]} for job in jobs] for jobs in rounds]
    variables = os.environ | {
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # `main` sets it too late for a driver that has imported PyTorch.
        "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(Path(jf.__file__).parent.parent), str(ROOT))),
    }  # fmt: skip
    driver = subprocess.run(
        [sys.executable, "-m", "tests.helpers.process_groups", str(speed), json.dumps(plan)], env=variables, cwd=folder,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (driver.returncode, driver.stderr) == (0, ""), driver.stderr
    return [
        {name: [Ended(**rank) for rank in ranks] for name, ranks in jobs.items()} for jobs in json.loads(driver.stdout)
    ]


def _drive(plan: Any) -> list[dict[str, list[dict[str, Any]]]]:
    return [_run_round(number, jobs) for number, jobs in enumerate(plan)]


def _run_round(number: int, jobs: Any) -> dict[str, list[dict[str, Any]]]:
    import socket

    started, children = time.monotonic(), {}
    for job in jobs:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(job["ranks"]):
            child = os.fork()
            if not child:
                _run_rank(job, rank, port, f"{job['name']}-{number}-{rank}")
            children[child] = job["name"], rank, f"{job['name']}-{number}-{rank}"
    ended: dict[str, dict[int, dict[str, Any]]] = {job["name"]: {} for job in jobs}
    while children:
        child, status = os.wait()
        name, rank, stem = children.pop(child)
        claims = Path(f"claims-{stem}")
        ended[name][rank] = {
            "code": os.waitstatus_to_exitcode(status), "out": Path(f"out-{stem}").read_text(),
            "err": Path(f"err-{stem}").read_text(), "seconds": time.monotonic() - started,
            "claimed": len(claims.read_text()) if claims.exists() else 0,
        }  # fmt: skip
    return {name: [ranks[rank] for rank in sorted(ranks)] for name, ranks in ended.items()}


def _run_rank(job: Any, rank: int, port: int, stem: str) -> None:
    import itertools
    import signal
    import traceback

    from jacobiflow.cli import main
    from jacobiflow.distributed import Processes

    signal.signal(signal.SIGINT, signal.default_int_handler)  # Programs in the background of a script ignore it.
    if job["ranks"] > 1:
        os.environ.update(_variables(job["launcher"], rank, job["ranks"], port))
    for stream in ("out", "err"):
        os.dup2(os.open(f"{stream}-{stem}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 1 if stream == "out" else 2)
    rename, claim, count = os.replace, Processes.claim, itertools.count(1)
    last = (job["kills"] or {}).get(str(rank))

    def counted(*names: Any) -> None:
        if next(count) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*names)

    def noted(self: Processes, units: Any) -> Any:
        for unit in claim(self, units):
            with open(f"claims-{stem}", "a") as file:
                file.write(".")
            yield unit

    os.replace, Processes.claim = counted, noted  # type: ignore[assignment, method-assign]
    code = 1
    try:
        if job["line"][0] == "python":
            exec(job["line"][1], {"rank": rank})
            code = 0
        else:
            code = main(job["line"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _variables(launcher: str, rank: int, count: int, port: int) -> dict[str, str]:
    """The variables that a launcher sets for a process."""
    if launcher == "torchrun":
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "TORCHELASTIC_RUN_ID": "test"}
    else:
        names = {
            "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_STEP_NUM_TASKS": count, "SLURM_JOB_ID": 7,
            "SLURM_STEP_ID": 0, "SLURM_STEP_NODELIST": "localhost",
        }  # fmt: skip
    return {name: str(value) for name, value in {**names, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items()}


if __name__ == "__main__":
    import torch.utils.tensorboard  # noqa: F401

    import jacobiflow.training.trainer
    from jacobiflow.cli import app  # noqa: F401
    from jacobiflow.distributed import watch

    for name in ("_BEAT", "_SILENCE", "_GRACE", "_BEFORE_MESSAGE", "_AFTER_MESSAGE"):
        setattr(watch, name, getattr(watch, name) / float(sys.argv[1]))
    jf.sample(jf.load("digits-p1"), 1, strategy="jacobi")  # so that no process pays for first use
    print(json.dumps(_drive(json.loads(sys.argv[2]))))
