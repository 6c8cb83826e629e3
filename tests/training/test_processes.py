"""Several processes train as one does: the same losses and weights, replicated or sharded, also after a death."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jacobiflow.training import read_metrics
from tests.helpers.training_runs import last_step

SCRIPT = """
import signal, sys, torch
import jacobiflow as jf
from jacobiflow.data import digits
from jacobiflow.training import TrainConfig, train

out, stop, shard = map(eval, sys.argv[1:])


def stop_at(metrics):
    if metrics.step == stop:
        signal.raise_signal(signal.SIGTERM)


SIZES = {"num_blocks": 2, "layers_per_block": 2, "num_classes": 10, "nvp": False, "head_dim": 8, "noise_std": 0.1}
with jf.processes() as processes:
    torch.manual_seed(processes.rank)  # The first process's weights count.
    flow = jf.TarFlow(jf.TarFlowConfig(1, 8, 4, 16, **SIZES))
    config = TrainConfig(
        14, batch_size=12, warmup=4, bf16=False, checkpoint_every=5, shard=shard, recompute=True, accumulation=2
    )
    train(flow, digits(), config, out, held_out=digits(), on_step=stop_at, processes=processes)
    local = [getattr(each, "_local_tensor", each).numel() for each in flow.parameters()]
    print(processes.rank, sum(local) / sum(each.numel() for each in flow.parameters()))
"""


def start(count: int, out: Path, stop: int = 0, shard: bool = False) -> list[subprocess.Popen[str]]:
    """Starts the processes as SLURM's srun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        "SLURM_STEP_NUM_TASKS": str(count), "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "localhost",
        "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR",
    }  # fmt: skip
    command = [sys.executable, "-c", SCRIPT, repr(str(out)), str(stop), str(shard)]
    return [
        subprocess.Popen(
            command, env=os.environ | shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    """Waits for all processes, which must succeed, and returns what they printed."""
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return [output for output, _ in outputs]


def assert_equal_runs(have: Path, want: Path) -> None:
    """Losses equal to rounding, and weights too, but for the biases of keys, on which attention does not depend."""
    for mine, other in zip(read_metrics(have), read_metrics(want), strict=True):
        assert mine.loss == pytest.approx(other.loss, abs=1e-5)
        assert (mine.held_out_loss is None) == (other.held_out_loss is None)
    assert read_metrics(have)[-1].held_out_loss == pytest.approx(read_metrics(want)[-1].held_out_loss, abs=1e-5)
    mine, other = (load_file(folder / "model.safetensors") for folder in (have, want))
    assert max(float((mine[name] - other[name]).abs().max()) for name in other if "qkv.bias" not in name) < 1e-5


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    finish(start(1, out))
    return out


def test_two_processes_train_as_one_and_any_number_resumes(alone: Path, tmp_path: Path) -> None:
    for process in start(2, tmp_path / "two", stop=7):
        assert "KeyboardInterrupt" in process.communicate(timeout=120)[1]
    for count in (1, 3):
        out = Path(shutil.copytree(tmp_path / "two", tmp_path / f"{count}"))
        assert last_step(out) == 8
        finish(start(count, out))
        assert_equal_runs(out, alone)


def test_sharded_processes_train_as_one_with_half_of_the_parameters_each(alone: Path, tmp_path: Path) -> None:
    outputs = finish(start(2, tmp_path / "run", shard=True))
    assert_equal_runs(tmp_path / "run", alone)
    for output in outputs:
        assert float(output.split()[1]) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_and_the_run_resumes(victim: int, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    processes = start(2, out)
    while not list(out.glob("checkpoint-*")):
        time.sleep(0.01)
    processes[victim].kill()
    _, errors = processes[1 - victim].communicate(timeout=60)
    assert processes[1 - victim].returncode != 0 and "ended without a message" in errors
    assert processes[victim].wait() == -signal.SIGKILL
    processes[victim].communicate()
    finish(start(2, out))
    assert_equal_runs(out, alone)
    assert torch.isfinite(next(iter(load_file(out / "model.safetensors").values()))).all()
