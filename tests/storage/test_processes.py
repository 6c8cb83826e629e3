"""Several processes: who works, who fails, and that they write what one alone writes."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import figures
from sample_folders import facts, partials

import jacobiflow as jf
from jacobiflow.storage import FirstProcessFailed, Processes, SampleFolderError

NUM = 16


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_two_processes_that_are_killed_write_what_one_does(tmp_path: Path) -> None:
    out, want, json_file = tmp_path / "out", tmp_path / "want", tmp_path / "f.json"
    options = ["sample", "--model", "digits-p1", "--num", str(NUM), "--strategy", "jacobi-3", "--batch-size", "1"]
    options += ["--shard-size", "1", "--out", str(out), "--json", str(json_file)]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("two_processes.py")), str(tmp_path), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    killed, resumed, other = json.loads(done.stdout)
    assert (killed["ends"], resumed["ends"], other["ends"]) == ([-9, -9], [0, 0], [2, 2])
    assert 2 <= len(killed["times"]) < NUM, "the kill did not hit in the middle"
    assert killed["times"].items() <= resumed["times"].items(), "a finished shard was drawn again"
    torch.set_num_threads(1)
    labels = torch.arange(NUM) % 10
    given: dict[str, Any] = {"strategy": "jacobi-3", "batch_size": 1, "shard_size": 1, "model": "digits-p1"}
    jf.sample_to_folder(jf.load("digits-p1"), NUM, want, labels, progress=False, **given)
    assert facts(out) == facts(want)
    assert not partials(out)
    shown = figures(json_file)
    assert (shown["processes"], shown["shards"], shown["drawn"]) == (2, NUM, NUM - len(killed["times"]))
    (first, warned), second = resumed["printed"]
    assert f"wrote {out}: {NUM} shards" in first
    assert re.search(rf": resumed, {NUM - len(killed['times'])} of {NUM} shards to draw\n", warned)
    assert second == ["", ""]
    words = "holds samples of seed 0, not 5; give another folder, or --overwrite to replace them"
    assert other["printed"] == [["", f"error: {out}: {words}\n"], ["", ""]]


def test_the_first_process_works_and_the_others_get_its_result_or_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[list[Any]] = []
    first, second = Processes(0, 2), Processes(1, 2)

    def once(process: Processes, work: Callable[[], Any]) -> Any:
        def broadcast(values: list[Any], src: int) -> None:
            assert src == 0
            if process is first:
                sent.append(list(values))
            else:
                values[:] = sent.pop()

        monkeypatch.setattr(importlib.import_module("torch.distributed"), "broadcast_object_list", broadcast)
        return process.once(work)

    for result in ((7, [1, 2]), None):
        assert once(first, lambda result=result: result) == result
        assert once(second, lambda: pytest.fail("called twice")) == result
    for error in (OSError(13, "denied"), SampleFolderError("no room"), KeyError(), RuntimeError()):

        def fail(error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error)) as caught:
            once(first, fail)
        assert caught.value is error
        with pytest.raises(FirstProcessFailed, match=f"^{re.escape(str(error) or type(error).__name__)}$"):
            once(second, fail)
    assert not sent


def test_a_process_alone_and_its_devices() -> None:
    with jf.processes() as among:
        assert among == Processes(0, 1, 0)
        assert among.once(lambda: 7) == 7
    assert [among.device(name) for name in ("cpu", "cuda", "cuda:3", "mps")] == ["cpu", "cuda", "cuda:3", "mps"]
    third = Processes(rank=5, count=8, local_rank=1)
    assert [third.device(name) for name in ("cpu", "cuda", "cuda:3", "mps")] == ["cpu", "cuda:1", "cuda:3", "mps"]
