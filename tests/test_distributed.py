"""Processes: what the first one does for all, and the device of each."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

import jacobiflow as jf
from jacobiflow.distributed import Processes, ProcessFailed
from jacobiflow.sampling.folder import SampleFolderError


def test_the_others_get_the_result_or_the_error_of_the_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(dist, "broadcast_object_list", lambda values, src: sent.extend(values))
    assert Processes(0, 2).run_on_rank_zero(lambda: [7]) == [7]
    with pytest.raises(SampleFolderError, match="no room"):
        Processes(0, 2).run_on_rank_zero(lambda: jf.SampleFolder.open("no room"))

    def receive(values: list[Any], src: int) -> None:
        values[:] = [sent.pop(0), sent.pop(0)]

    monkeypatch.setattr(dist, "broadcast_object_list", receive)
    assert Processes(1, 2).run_on_rank_zero(lambda: pytest.fail("called twice")) == [7]
    with pytest.raises(ProcessFailed, match=r"^manifest no room"):
        Processes(1, 2).run_on_rank_zero(lambda: pytest.fail("called twice"))


@pytest.mark.parametrize(("num_gpus", "own"), [(4, 1), (1, 0)])
def test_a_process_alone_and_its_devices(num_gpus: int, own: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = Mock()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen)
    with jf.processes() as alone:
        assert (alone, alone.run_on_rank_zero(lambda: 7)) == (Processes(0, 1, 0), 7)
    assert [alone.device(name) for name in ("cpu", "cuda", "cuda:3")] == ["cpu", "cuda", "cuda:3"]
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in {"TORCHELASTIC_RUN_ID": "test", **variables}.items():
        monkeypatch.setenv(name, value)
    with jf.processes() as one:
        assert one.device("cpu") == "cpu"
    sixth = Processes(rank=5, count=8, local_rank=1)
    assert [sixth.device(name) for name in ("cpu", "cuda:3")] == ["cpu", "cuda:3"]
    chosen.assert_not_called()
    assert sixth.device("cuda") == f"cuda:{own}"
    chosen.assert_called_once_with(own)
