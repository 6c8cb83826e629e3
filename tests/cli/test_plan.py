"""`jacobiflow plan`: a file that sample takes, and a table of what is in it."""

from __future__ import annotations

import inspect
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import jacobiflow as jf
from jacobiflow.cli import plan
from jacobiflow.cli.plan import PlanConfig
from tests.helpers.running import figures

GUIDED = "--guidance 0.4,attn_temperature=0.9,annealed=false,on=shift"


def test_a_plan_is_one_that_sample_takes(run: Any, tmp_path: Path) -> None:
    """Under guidance."""
    out, flow = tmp_path / "new" / "plan.json", jf.load("digits-p1")
    result = run(f"plan --model digits-p1 --batch-size 3 {GUIDED} --out {out} --json {tmp_path}/f")
    assert (result.code, result.err) == (0, "")
    found = jf.Strategy.load(out)
    assert figures(tmp_path / "f")["strategy"] == found.to_json()
    made_for = found.prediction
    assert made_for is not None
    found.check(flow.guided(made_for.guidance))
    assert made_for.guidance == jf.Guidance(0.4, annealed=False, on="shift", attn_temperature=0.9)
    assert (made_for.batch_size, found.tolerance) == (3, 1e-3)
    tokens = found.solvers[3].partition.stop(0, flow.config.num_tokens)
    assert any(line.split()[:2] == ["3", str(tokens)] for line in result.out.splitlines())
    seconds = f"{made_for.seconds:.3f} s a batch, the exact loop {made_for.sequential_seconds:.3f} s"
    assert f"predicted: {seconds}" in result.out
    use = re.search(rf"wrote {out}\nuse it: jacobiflow (.*)", result.out)
    assert use is not None
    result = run(f"{use[1]} --out {tmp_path}/s")
    assert (result.code, result.err) == (0, "")
    folder = jf.SampleFolder.open(tmp_path / "s")
    assert (folder.spec.num, folder.spec.batch_size, folder.spec.strategy) == (3, 3, str(out))


def test_progress_covers_the_timing_of_blocks(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = list[tuple[int, int, str]]()
    monkeypatch.setattr(plan, "progress_bar", lambda: nullcontext(lambda *report: reports.append(report)))
    assert run(f"plan --model model --out {tmp_path}/p.json").code == 0
    assert reports[0][2] == "timing blocks"
    steps = [(done, total) for done, total, what in reports if what == "timing blocks"]
    assert steps == [(done, steps[-1][1]) for done in range(len(steps))]


def test_the_batch_size_is_that_of_python() -> None:
    assert int(PlanConfig.batch_size) == inspect.signature(jf.plan).parameters["batch_size"].default
