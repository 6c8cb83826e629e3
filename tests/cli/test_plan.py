"""`jacobiflow plan`: a file that sample takes, and a table of what is in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from running import figures

import jacobiflow as jf

GUIDED = "--guidance 0.4 --guidance-on shift --constant-guidance --attn-temperature 0.9"


def test_a_plan_is_one_that_sample_takes(run: Any, tmp_path: Path) -> None:
    """By the report in the model's folder, under guidance."""
    out, flow = tmp_path / "new" / "plan.json", jf.load("digits-p1")
    result = run(f"plan --model digits-p1 --batch-size 3 {GUIDED} --out {out} --json {tmp_path}/f.json")
    assert (result.code, result.err) == (0, "")
    found, shown = jf.Strategy.load(out), figures(tmp_path / "f.json")
    assert jf.Strategy.from_json(shown) == found
    assert (shown["model"], Path(shown["report"])) == ("digits-p1", jf.find_report(flow))
    found.check(flow)
    made_for = found.prediction
    assert made_for is not None
    assert made_for.guidance == jf.Guidance(0.4, annealed=False, on="shift", attn_temperature=0.9)
    assert (made_for.batch_size, found.tolerance) == (3, 1e-3)
    lines = result.out.splitlines()
    for i, solver in enumerate(found.solvers):
        tokens = solver.partition.stop(0, flow.config.num_tokens)
        assert any(line.split()[:2] == [str(i), str(tokens)] for line in lines)
    seconds = f"{made_for.seconds:.3f} s a batch, the sequential loop {made_for.sequential_seconds:.3f} s"
    assert f"predicted: {seconds}" in result.out
    assert f"wrote {out}\n" in result.out
    use = re.search(r"use it: jacobiflow (.*)", result.out)
    assert use is not None
    result = run(f"{use[1]} --out {tmp_path}/s --json {tmp_path}/s.json")
    assert (result.code, result.err) == (0, "")
    drawn = figures(tmp_path / "s.json")
    assert (drawn["num"], drawn["batch_size"]) == (3, 3)
    assert drawn["runs"][str(out)]["certificate"] <= 1e-3
