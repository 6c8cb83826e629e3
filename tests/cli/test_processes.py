"""Commands by several processes and parts: the results of one process, whoever is killed."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

import jacobiflow as jf
from tests.helpers.process_groups import Job, run_jobs
from tests.helpers.running import figures

FEATURES = "def rows(images):\n    return images.double().mean(dim=(1, 3))\n"


@pytest.mark.skipif(not hasattr(os, "fork") or find_spec("torchmetrics") is None, reason="forks, needs extra eval")
def test_two_processes_and_two_parts_give_the_results_of_one(work: Path, tmp_path: Path) -> None:
    """Each does half of the work. Of a kill only the units in work are lost."""
    (tmp_path / "mine.py").write_text(FEATURES)
    jf.sample_to_folder(
        jf.load(work / "model"), 12, tmp_path / "samples", [0, 1, 2] * 4, strategy="jacobi", batch_size=4, shard_size=8
    )
    score = f"evaluate --model {work}/model --samples samples --images {work}/pets --features mine.py:rows --paired 9"
    scores = {name: f"{score} --batch-size 2 --out scores-{name}".split() for name in ("one", "two", "killed", "parts")}
    parts = [[*scores["parts"], "--part", f"{i}/2"] for i in (1, 2)]
    first, second, third = run_jobs(
        [
            [Job(scores["one"], 1, name="one"), Job(parts[1], 1, name="2"), Job(scores["killed"], kills={0: 6})],
            [Job(scores["two"], name="two"), Job([*parts[0], "--seed", "1"], name="other")],
            [Job(scores["killed"]), Job(parts[0], name="1")],
        ],
        tmp_path,
    )  # fmt: skip
    killed, other = first["job"]
    assert (killed.code, other.code, other.err.count("\n")) == (-9, 2, 1)
    assert other.seconds - killed.seconds < 10
    for jobs in (second["two"], third["job"], third["1"]):
        assert [ended.code for ended in jobs] == [0, 0], jobs
    assert first["one"][0].claimed == sum(ended.claimed for ended in second["two"]) == 2 + 1 + 5 + 2 * 5
    assert all(ended.claimed > 0 for ended in second["two"])
    assert "the scores follow once other parts have done 9 more units" in first["2"][0].out
    message = "error: scores-parts: holds scores of other inputs; give another folder, or --overwrite\n"
    assert [ended.err for ended in second["other"]] in ([message, ""], ["", message])

    want = figures(tmp_path / "scores-one" / "evaluation.json")["scores"]
    numbers = {name: value for name, value in want.items() if isinstance(value, float)}
    assert len(numbers) == 8
    for name in ("two", "killed", "parts"):
        found = figures(tmp_path / f"scores-{name}" / "evaluation.json")["scores"]
        assert {name: found[name] for name in numbers} == pytest.approx(numbers, rel=1e-6)
        assert (found["paired"], found["stored"]) == (want["paired"], want["stored"])
    assert not [*tmp_path.glob("*.partial"), *tmp_path.glob("*/units")]
