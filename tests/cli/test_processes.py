"""Commands by several processes: the results of one process, whoever is killed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers.process_groups import Job, run_jobs


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_two_processes_give_the_report_of_one(work: Path, tmp_path: Path) -> None:
    """Each does half of the work. Of a kill only the units in work are lost."""
    line = f"calibrate --model {work}/model --images {work}/pets --per-class --segments 4 --convergence-samples 3"
    one, two, killed = (f"{line} --batch-size 2 --out report-{name}".split() for name in ("one", "two", "killed"))
    first, second = run_jobs(
        [[Job(one, 1, name="one"), Job(killed, kills={1: 4})], [Job(two, name="two"), Job(killed)]], tmp_path
    )
    other, ended = first["job"]
    assert (ended.code, other.code, other.err.count("\n")) == (-9, 2, 1)
    assert other.seconds - ended.seconds < 10
    assert [each.code for each in (*second["two"], *second["job"])] == [0, 0, 0, 0]
    assert all(each.claimed > 0 for each in second["two"])
    assert second["two"][0].out.replace("-two", "-one") == first["one"][0].out
    assert len({(tmp_path / f"report-{name}").read_bytes() for name in ("one", "two", "killed")}) == 1
    assert not [*tmp_path.glob("*.partial"), *tmp_path.glob("*/units")]
