"""`jacobiflow plan`: a file that sample takes, and a table of what is in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jacobiflow as jf
from tests.helpers.running import figures

GUIDED = "--guidance 0.4,attn_temperature=0.9,annealed=false,on=shift"


def test_a_plan_is_one_that_sample_takes(run: Any, tmp_path: Path) -> None:
    """By the tuning in the model's folder, under guidance."""
    out, flow = tmp_path / "new" / "plan.json", jf.load("digits-p1")
    result = run(f"plan --model digits-p1 --batch-size 3 {GUIDED} --out {out} --json {tmp_path}/f.json")
    assert (result.code, result.err) == (0, "")
    found, shown = jf.Strategy.load(out), figures(tmp_path / "f.json")
    assert jf.Strategy.from_json(shown["strategy"]) == found
    assert (shown["model"], Path(shown["tuning"])) == ("digits-p1", jf.find_tuning(flow))
    found.check(flow)
    made_for = found.prediction
    assert made_for is not None
    assert made_for.guidance == jf.Guidance(0.4, annealed=False, on="shift", attn_temperature=0.9)
    assert (made_for.batch_size, found.tolerance) == (3, 1e-3)
    lines = result.out.splitlines()
    for i, solver in enumerate(found.solvers):
        tokens = solver.partition.stop(0, flow.config.num_tokens)
        assert any(line.split()[:2] == [str(i), str(tokens)] for line in lines)
    seconds = f"{made_for.seconds:.3f} s a batch, the exact loop {made_for.sequential_seconds:.3f} s"
    assert f"predicted: {seconds}" in result.out
    assert f"wrote {out}\n" in result.out
    use = re.search(r"use it: jacobiflow (.*)", result.out)
    assert use is not None
    result = run(f"{use[1]} --out {tmp_path}/s --json {tmp_path}/s.json")
    assert (result.code, result.err) == (0, "")
    drawn = figures(tmp_path / "s.json")
    assert (drawn["num"], drawn["batch_size"]) == (3, 3)
    assert drawn["runs"][str(out)]["certificate"] <= 1e-3


def test_a_tuning_is_fitted_and_kept(run: Any, tmp_path: Path) -> None:
    """In the model's folder; beside the plan if the model is a bundled one; a file that is named is used."""
    jf.load("digits-maf").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tuning.json").unlink()
    for model, place in ((tmp_path / "model", tmp_path / "model"), ("digits-maf", tmp_path)):
        result = run(f"plan --model {model} --tune --out {tmp_path}/p.json --json {tmp_path}/f.json")
        assert (result.code, result.err) == (0, "")
        assert figures(tmp_path / "f.json")["tuning"] == str(place / "tuning.json")
        jf.Tuning.load(place / "tuning.json").check(jf.load("digits-maf"))
    result = run(f"plan --model digits-maf --tune --tuning {tmp_path}/tuning.json --out {tmp_path}/p.json")
    assert (result.code, "leave it out with --tune" in result.err) == (2, True)
