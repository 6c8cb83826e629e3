"""Ranks of processes that launchers have started."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

from jacobiflow.errors import InputValueError
from jacobiflow.utils.launch import Launch, find_launch, local_device

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0"}


def test_torchrun_comes_before_srun() -> None:
    """`srun torchrun` sets the variables of both."""
    assert find_launch({}) == find_launch({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == Launch(0, 1, 0)
    assert find_launch(SRUN) == Launch(3, 4, 0)
    assert find_launch(SRUN | TORCHRUN) == Launch(5, 8, 1)


@pytest.mark.parametrize("variables", [TORCHRUN | {"RANK": "first"}, {"WORLD_SIZE": "8"}])
def test_incomplete_variables_are_refused(variables: dict[str, str]) -> None:
    with pytest.raises(InputValueError, match=r"RANK, WORLD_SIZE, LOCAL_RANK: .*unset WORLD_SIZE for one process"):
        find_launch(variables)


def test_each_process_has_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher may show a process one GPU of its machine, or all."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", choose := Mock())
    assert local_device("cuda") == local_device("auto") == "cuda"
    for rank, device in (("1", "cuda:1"), ("2", "cuda:0")):
        for name, value in (TORCHRUN | {"LOCAL_RANK": rank}).items():
            monkeypatch.setenv(name, value)
        assert (local_device("cuda"), local_device("cpu"), local_device("cuda:3")) == (device, "cpu", "cuda:3")
    assert [call.args for call in choose.call_args_list] == [(1,), (0,)]
