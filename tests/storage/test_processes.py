"""Several processes: who works, who fails, and that they write what one alone writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import jacobiflow as jf
from jacobiflow.storage import FirstProcessFailed, Processes, SampleFolderError
from tests.helpers.running import figures
from tests.helpers.sample_folders import facts, times

pytestmark = pytest.mark.usefixtures("one_thread")
NUM = 12
# Forks two processes that find each other as those of torchrun do, twice. In the first run the second process kills
# itself before its sixth file gets its name: its third shard has images, but no record.
DRIVER = """
import itertools, os, shutil, signal, socket, sys
import jacobiflow as jf
from jacobiflow.cli import main

jf.sample(jf.load("digits-p1"), 1, strategy="jacobi")  # so that no process pays for first use
rename = os.replace

def start(rank, port, last):
    child = os.fork()
    if child:
        return child
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update(TORCHELASTIC_RUN_ID="test")
    sys.stdout, sys.stderr = (open(name + rank, "w", buffering=1) for name in ("out", "err"))
    count = itertools.count(1)
    os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL) if next(count) == last else rename(*names)
    try:
        os._exit(main(sys.argv[1:]))
    finally:
        os._exit(1)

for last in (6, None):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    first, second = start("0", port, None), start("1", port, last)
    ended = os.waitpid(second, 0)[1]
    if last:
        os.kill(first, signal.SIGKILL)  # as torchrun does
    print(os.waitstatus_to_exitcode(ended), os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]))
    shutil.copytree("samples", "killed" if last else "resumed")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_two_processes_that_are_killed_write_what_one_does(tmp_path: Path) -> None:
    options = ["sample", "--model", "digits-p1", "--plain", "--num", str(NUM), "--strategy", "jacobi-3"]
    options += ["--batch-size", "1", "--shard-size", "1", "--out", "samples", "--json", "f.json"]
    driver = subprocess.run(
        [sys.executable, "-c", DRIVER, *options], env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (driver.stdout, driver.stderr) == ("-9 -9\n0 0\n", "")
    before, after = times(tmp_path / "killed"), times(tmp_path / "resumed")
    left = NUM - len(before) // 2
    assert 0 < left <= NUM - 2, "the kill did not hit in the middle"
    assert before.items() <= after.items(), "a finished shard was drawn again"
    jf.sample_to_folder(
        jf.load("digits-p1"), NUM, tmp_path / "want", torch.arange(NUM) % 10, strategy="jacobi-3", batch_size=1,
        shard_size=1, model="digits-p1",
    )  # fmt: skip
    assert facts(tmp_path / "samples") == facts(tmp_path / "want")
    first, warning, *others = ((tmp_path / name).read_text() for name in ("out0", "err0", "out1", "err1"))
    assert f"wrote samples: {NUM} shards" in first
    assert warning.startswith("warning: 12 samples: not certified")
    assert others == ["", ""]
    shown = figures(tmp_path / "f.json")
    assert (shown["processes"], shown["shards"], shown["drawn"]) == (2, NUM, left)


def test_the_others_get_the_result_or_the_error_of_the_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(dist, "broadcast_object_list", lambda values, src: sent.extend(values))
    assert Processes(0, 2).on_first(lambda: [7]) == [7]
    with pytest.raises(SampleFolderError, match="no room"):
        Processes(0, 2).on_first(lambda: jf.SampleFolder.open("no room"))

    def receive(values: list[Any], src: int) -> None:
        values[:] = [sent.pop(0), sent.pop(0)]

    monkeypatch.setattr(dist, "broadcast_object_list", receive)
    assert Processes(1, 2).on_first(lambda: pytest.fail("called twice")) == [7]
    with pytest.raises(FirstProcessFailed, match=r"^manifest no room"):
        Processes(1, 2).on_first(lambda: pytest.fail("called twice"))


def test_a_process_alone_and_its_devices() -> None:
    with jf.processes() as alone:
        assert (alone, alone.on_first(lambda: 7)) == (Processes(0, 1, 0), 7)
    assert [alone.device(name) for name in ("cpu", "cuda", "cuda:3")] == ["cpu", "cuda", "cuda:3"]
    third = Processes(rank=5, count=8, local_rank=1)
    assert [third.device(name) for name in ("cpu", "cuda", "cuda:3")] == ["cpu", "cuda:1", "cuda:3"]
