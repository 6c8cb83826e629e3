"""`jacobiflow plan`: a file that sample takes, and a table of what is in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from running import figures

import jacobiflow as jf

GUIDED = "--guidance 0.4 --guidance-on shift --constant-guidance --attn-temperature 0.9"


@pytest.mark.parametrize(("model", "options"), [("plain", "--tolerance 1e-2"), ("digits-p1", GUIDED)])
def test_a_plan_is_one_that_sample_takes(model: str, options: str, run: Any, tmp_path: Path) -> None:
    """A tiny model with a report of its own, and a bundled one by its model folder's."""
    if model == "plain":
        line = f"--segments 2 --traced 2 --chord --out {tmp_path}/report.json"
        assert run(f"calibrate --model plain --images pets {line}").code == 0
        options += f" --report {tmp_path}/report.json"
    out, tolerance = tmp_path / "new" / "plan.json", 1e-2 if model == "plain" else 1e-3
    result = run(f"plan --model {model} --batch-size 3 {options} --out {out} --json {tmp_path}/f.json")
    assert (result.code, result.err) == (0, "")
    found, flow, shown = (
        jf.Strategy.load(out),
        jf.load(model if "-" in model else "./plain"),
        figures(tmp_path / "f.json"),
    )
    assert jf.Strategy.from_json(shown) == found
    assert shown["model"] == model
    assert Path(shown["report"]) == (tmp_path / "report.json" if model == "plain" else flow.report_file)
    found.check(flow)
    prediction = found.prediction
    assert prediction is not None
    assert (prediction.batch_size, found.tolerance) == (3, tolerance)
    guidance = None if model == "plain" else jf.Guidance(0.4, annealed=False, on="shift", attn_temperature=0.9)
    assert prediction.guidance == guidance
    lines = result.out.splitlines()
    assert lines[0].startswith(f"{model}, batch size 3, cpu")
    for i, solver in enumerate(found.solvers):
        tokens = solver.partition.stop(0, flow.config.num_tokens)
        assert any(line.split()[:2] == [str(i), str(tokens)] for line in lines)
    assert (
        f"predicted: {prediction.seconds:.3f} s a batch, the sequential loop {prediction.sequential_seconds:.3f} s"
        in (result.out)
    )
    assert f"wrote {out}\n" in result.out
    use = re.search(r"use it: jacobiflow (.*)", result.out)
    assert use is not None
    result = run(f"{use[1]} --out {tmp_path}/s --json {tmp_path}/s.json")
    assert (result.code, result.err) == (0, "")
    drawn = figures(tmp_path / "s.json")
    assert (drawn["num"], drawn["batch_size"]) == (3, 3)
    assert drawn["runs"][str(out)]["certificate"] <= tolerance
