"""Samples by several processes and by parts: the bytes of one process, whoever is killed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import jacobiflow as jf
from jacobiflow.distributed import parts as module
from jacobiflow.distributed.parts import start_part
from jacobiflow.sampling.folder import SampleFolderError
from jacobiflow.utils.files import FolderInUseError, locked
from tests.helpers.process_groups import Job, run_jobs
from tests.helpers.running import figures
from tests.helpers.sample_folders import everything, facts, run

pytestmark = pytest.mark.usefixtures("one_thread")

NUM = 24
LINE = f"sample --model digits-p1 --plain --num {NUM} --strategy jacobi-3 --batch-size 1 --shard-size 1 --out".split()
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


@pytest.fixture(scope="module")
def want(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder that one process writes."""
    out = tmp_path_factory.mktemp("want")
    jf.sample_to_folder(
        jf.load("digits-p1"), NUM, out, torch.arange(NUM) % 10, settings=None, strategy="jacobi-3", batch_size=1,
        shard_size=1, model="digits-p1",
    )  # fmt: skip
    return facts(out)


@FORKS
def test_processes_and_parts_share_the_work_and_may_be_killed(want: Any, tmp_path: Path) -> None:
    """Two processes, each of them killed in turn as it writes a file; two that are not; and three parts, one killed."""
    killed, two, parts = ([*LINE, name] for name in ("killed", "two", "parts"))
    one, middle, last = ([*parts, "--part", f"{i}/3"] for i in (1, 2, 3))
    first, second, third = run_jobs(
        [
            [Job(killed, kills={0: 9}), Job([*two, "--json", "f.json"], name="two")],
            [Job(killed, kills={1: 6}), Job(one, name="1"), Job(middle, 1, {0: 7}, name="2")],
            [Job(killed), Job(last, 1, name="3"), Job(middle, 1, name="2"), Job([*two, "--seed", "1"], name="other")],
        ],
        tmp_path,
    )  # fmt: skip
    lost = re.compile(r"error: \w+ process.* ended without a message, .*; run the same command again, which resumes\n")
    for rank, ended in ((0, first["job"]), (1, second["job"])):
        assert ended[rank].code == -9
        other = ended[1 - rank]
        assert (other.code, other.out, other.err.count("\n")) == (2, "", 1)
        assert re.match(lost, other.err.replace("process 0", "a process")), other.err
        assert other.seconds - ended[rank].seconds < 10
    assert [ended.code for ended in third["job"]] == [0, 0]
    assert f"wrote killed: {NUM} shards" in third["job"][0].out
    assert (third["job"][1].out, third["job"][1].err) == ("", "")
    claimed = sum(ended.claimed for each in (first, second, third) for ended in each["job"])
    assert NUM <= claimed <= NUM + 2, "a finished shard was drawn again"

    both = first["two"]
    assert [ended.code for ended in both] == [0, 0] and sum(ended.claimed for ended in both) == NUM
    assert all(ended.claimed > 0 for ended in both)
    assert (figures(tmp_path / "f.json")["processes"], figures(tmp_path / "f.json")["num_new"]) == (2, NUM)
    assert third["other"][0].err + third["other"][1].err == (
        "error: two: holds samples of seed 0, not 1; give another folder, or overwrite it\n"
    )

    assert [ended.code for ended in second["1"]] == [0, 0] and second["2"][0].code == -9
    assert "part 1/3 has drawn its samples into parts; others are missing, which" in second["1"][0].out
    assert [third[name][0].code for name in ("2", "3")] == [0, 0] and third["3"][0].claimed == NUM / 3
    assert facts(tmp_path / "killed") == facts(tmp_path / "two") == facts(tmp_path / "parts") == want
    assert not list((tmp_path / "parts").glob(".lock-*"))


@contextmanager
def starting_part(out: Path, part: jf.Part) -> Iterator[None]:
    """A part that runs."""
    with ExitStack() as locks:
        with start_part(out, part, locks):
            pass
        yield


def test_each_part_draws_its_shards_of_the_first_one_s_strategy(tmp_path: Path) -> None:
    strategies = [jf.Strategy.uniform(jf.Solver(jf.Window(size)), 1) for size in (4, 5, 6)]
    draw: dict[str, Any] = {"shard_size": 2, "strategy": "auto"}
    run(tmp_path / "want", plan=lambda: strategies[0], **draw)
    for index, plan in enumerate(strategies, 1):
        folder = run(tmp_path / "out", plan=lambda plan=plan: plan, part=jf.Part(index, 3), **draw)
        assert (folder.num_new, folder.is_complete) == ((4, 4, 2)[index - 1], index == 3)
        problem = "".join(folder.problems())
        assert index != 1 or "out: 4 of 10 samples are drawn, and others of part 2/3, 3/3 are not; wait for" in problem
    assert facts(tmp_path / "out") == facts(tmp_path / "want")
    assert run(tmp_path / "out", part=jf.Part(1, 3), **draw).num_new == 0


def test_parts_refuse_what_differs_and_the_same_part_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, settings = tmp_path / "out", {"shard_size": 2}
    with pytest.raises(KeyboardInterrupt):
        run(out, part=jf.Part(1, 2), draw=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt), **settings)
    with starting_part(out, jf.Part(1, 2)):
        before = everything(out)
        refusals: list[tuple[dict[str, Any], str]] = [
            ({"part": jf.Part(1, 2)}, "another run of part 1/2 is writing to it; wait for it, stop it"),
            ({"part": jf.Part(2, 3)}, "part 1/2 of another run is writing to it; wait for it"),
            ({}, "part 1/2 of another run is writing to it"),
            ({"part": jf.Part(2, 2), "seed": 1}, "holds samples of seed 0, not 1"),
            ({"part": jf.Part(2, 2), "num": 12}, "parts of 10 samples are running; give num=10"),
        ]
        for changed, words in refusals:
            with pytest.raises((SampleFolderError, FolderInUseError), match=words):
                run(out, **{**settings, **changed})
            assert everything(out) == before
        assert run(out, part=jf.Part(2, 2), **settings).num_new == 4
    with starting_part(out, jf.Part(1, 1)), pytest.raises(FolderInUseError, match="out: another run is writing to it"):
        run(out, part=jf.Part(1, 2), **settings)
    monkeypatch.setattr(module, "_MAX_START_SECONDS", 0.4)
    with locked(out), pytest.raises(FolderInUseError, match=r"another run is writing to it \(waited 0 s\); wait for"):
        run(out, part=jf.Part(1, 2), **settings)
    assert run(out, num=12, part=jf.Part(1, 2), **settings).num_new == 6
    assert run(out, num=12, **settings).num_new == 2
    assert json.loads((out / "manifest.json").read_text())["num"] == 12
