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
    measure = f"calibrate --model {work}/model --images {work}/pets --per-class --segments 4 --convergence-samples 3"
    scores, reports = (
        {name: [*f"{line} --batch-size 2 --out {out}-{name}".split()] for name in ("one", "two", "killed", "parts")}
        for out, line in (("scores", score), ("report", measure))
    )
    parts = [[*scores["parts"], "--part", f"{i}/2"] for i in (1, 2)]
    first, second, third = run_jobs(
        [
            [Job(scores["one"], 1, name="one"), Job(reports["one"], 1, name="report"), Job(parts[1], 1, name="2"),
             Job(scores["killed"], kills={0: 6}), Job(reports["killed"], kills={1: 4}, name="killed report")],
            [Job(scores["two"], name="two"), Job(reports["two"], name="report"),
             Job([*parts[0], "--seed", "1"], name="other")],
            [Job(scores["killed"]), Job(reports["killed"], name="killed report"), Job(parts[0], name="1")],
        ],
        tmp_path,
    )  # fmt: skip
    for rank, ended in ((0, first["job"]), (1, first["killed report"])):
        assert (ended[rank].code, ended[1 - rank].code, ended[1 - rank].err.count("\n")) == (-9, 2, 1)
        assert ended[1 - rank].seconds - ended[rank].seconds < 10
    for jobs in (second["two"], second["report"], third["job"], third["killed report"], third["1"]):
        assert [ended.code for ended in jobs] == [0, 0], jobs
    assert first["one"][0].claimed == sum(ended.claimed for ended in second["two"]) == 2 + 1 + 5 + 2 * 5
    assert all(ended.claimed > 0 for ended in (*second["two"], *second["report"]))
    assert "the scores follow once other parts have done 9 more units" in first["2"][0].out
    message = "error: scores-parts: holds scores of other inputs; give another folder, or --overwrite\n"
    assert [ended.err for ended in second["other"]] in ([message, ""], ["", message])

    assert second["report"][0].out.replace("-two", "-one") == first["report"][0].out
    assert len({(tmp_path / f"report-{name}").read_bytes() for name in ("one", "two", "killed")}) == 1
    want = figures(tmp_path / "scores-one" / "evaluation.json")["scores"]
    numbers = {name: value for name, value in want.items() if isinstance(value, float)}
    assert len(numbers) == 8
    for name in ("two", "killed", "parts"):
        found = figures(tmp_path / f"scores-{name}" / "evaluation.json")["scores"]
        assert {name: found[name] for name in numbers} == pytest.approx(numbers, rel=1e-6)
        assert (found["paired"], found["stored"]) == (want["paired"], want["stored"])
    assert not [*tmp_path.glob("*.partial"), *tmp_path.glob("*/units")]
