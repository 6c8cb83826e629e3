"""Several processes train as one does, replicated or sharded; if one ends, all do, and the next run resumes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

import jacobiflow as jf
from jacobiflow.training import processes, read_metrics
from jacobiflow.training.checkpoint import last_step
from tests.helpers import training_program

ROOT = Path(__file__).resolve().parent.parent.parent
TORCHRUN = "torch.distributed.run --standalone --nproc-per-node 2 -m"
SRUN = "tests.helpers.srun 2"
PROGRAM = "tests.helpers.training_program"
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def launch(launcher: str, out: Path, options: str = "") -> subprocess.CompletedProcess[str]:
    variables = os.environ | {
        "TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join((str(Path(jf.__file__).parent.parent), str(ROOT))),
    }  # fmt: skip
    command = [sys.executable, "-m", *launcher.split(), PROGRAM, str(out), *options.split()]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("alone")
    training_program.run(str(out))
    return out


def assert_equal_runs(out: Path, alone: Path) -> None:
    """Equal losses and weights, but for the biases of keys: attention does not depend on them."""
    have, want = read_metrics(out), read_metrics(alone)
    assert [metrics.loss for metrics in have] == pytest.approx([metrics.loss for metrics in want], abs=1e-5)
    assert last_step(out) == have[-1].step == 6
    assert have[-1].held_out_loss == pytest.approx(want[-1].held_out_loss, abs=1e-5)
    mine, other = (load_file(folder / "model.safetensors") for folder in (out, alone))
    assert max(float((mine[key] - other[key]).abs().max()) for key in other if "qkv.bias" not in key) < 1e-5
    assert jf.load(out).classes == training_program.NAMES


@FORKS
@pytest.mark.parametrize(
    ("launcher", "killed", "options", "launcher_of_next"),
    [
        (SRUN, 0, "--shard", SRUN),
        pytest.param(TORCHRUN, 1, "", TORCHRUN, marks=pytest.mark.slow),
        pytest.param(TORCHRUN, 0, "--shard", SRUN.replace("2", "3"), marks=pytest.mark.slow),
    ],
)
def test_a_death_ends_all_and_the_next_run_ends_as_one_process(
    launcher: str, killed: int, options: str, launcher_of_next: str, alone: Path, tmp_path: Path
) -> None:
    first = launch(launcher, tmp_path, f"{options} --kill {killed}")
    assert first.returncode != 0 and last_step(tmp_path) < 6
    last = launch(launcher_of_next, tmp_path, options)
    assert last.returncode == 0, last.stderr
    assert_equal_runs(tmp_path, alone)
    (count, *_), shares = re.findall(r"\d", launcher_of_next), re.findall(r"share ([\d.]+)", last.stdout)
    assert [float(share) for share in shares] == pytest.approx(
        [1 / int(count) if options else 1] * len(shares), abs=0.1
    )


@pytest.mark.slow
@FORKS
def test_a_signal_ends_all_after_the_same_step(alone: Path, tmp_path: Path) -> None:
    first = launch(SRUN, tmp_path, "--shard --stop 3")
    assert first.returncode != 0 and last_step(tmp_path) == 4
    training_program.run(str(tmp_path))
    assert_equal_runs(tmp_path, alone)


TASK = {
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "3", "SLURM_STEP_NODELIST": "gpu[03-07,9],login1",
}  # fmt: skip


def address_of(**variables: str) -> tuple[str, int]:
    """The address at which a task of srun joins the others."""
    with (
        patch.dict(os.environ, {**TASK, **variables}), patch.object(dist, "destroy_process_group"),
        patch.object(dist, "init_process_group") as init, processes.process_group(),
    ):  # fmt: skip
        assert (init.call_args.kwargs["rank"], init.call_args.kwargs["world_size"]) == (5, 8)
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def test_tasks_of_srun_meet_at_the_first_host() -> None:
    host, port = address_of()
    assert host == "gpu03" and 20_000 <= port < 30_000
    assert address_of(SLURM_STEP_ID="4")[1] != port
    assert address_of(MASTER_ADDR="me", MASTER_PORT="77") == ("me", 77)
    # SLURM writes numbers of one width in brackets, alone or as a range.
    for nodes, first in {"node1": "node1", "a-b,c": "a-b", "n[9]": "n9", "r-[10,7-8]-b,x": "r-10-b"}.items():
        assert address_of(SLURM_STEP_NODELIST=nodes)[0] == first


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "time"),
        ({"SLURM_STEP_NODELIST": ""}, "MASTER_ADDR"),
        ({"SLURM_STEP_ID": "x"}, "'x'"),
    ],
)
def test_processes_that_cannot_be_reached_are_one_line(variables: dict[str, str], reason: str) -> None:
    message = rf"^process 5 of 8 cannot reach the others \(.*{reason}.*\); check .* MASTER_ADDR and MASTER_PORT$"
    with (
        patch.dict(os.environ, {**TASK, **variables}), patch.object(processes, "_TIMEOUT", timedelta(seconds=1)),
        pytest.raises(jf.InputError, match=message), processes.process_group(),
    ):  # fmt: skip
        pass


def test_the_loss_of_another_process_is_one_line() -> None:
    with (
        patch.dict(os.environ, TASK), patch.object(dist, "init_process_group"),
        pytest.raises(jf.InputError, match=r"^process 5 of 8 has lost another process"), processes.process_group(),
    ):  # fmt: skip
        raise RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer")


def test_one_process_needs_no_group() -> None:
    for variables in ({}, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}):
        with patch.dict(os.environ, variables), processes.process_group():
            assert (processes.rank(), processes.world_size(), dist.is_initialized()) == (0, 1, False)
