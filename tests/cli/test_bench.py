"""`jacobiflow bench`: it writes what the library measures."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import jacobiflow as jf
from jacobiflow.evaluation import sample_errors
from jacobiflow.planner import Prediction
from jacobiflow.utils.timing import describe_machine
from tests.helpers.running import figures

GUIDANCE = jf.Guidance(0.7, annealed=False, on="shift", attn_temperature=0.8)
GUIDED = "--guidance 0.7,attn_temperature=0.8,annealed=false,on=shift"
BASELINES = ["growing cache", "sequential"]
NAMES = {"growing cache": "original sampler", "sequential": "exact loop"}


def rows_of(out: Path) -> dict[str, Any]:
    (entry,) = figures(out / "bench.json")["comparisons"]
    return {row["strategy"]: row for row in entry["rows"]}


def test_a_bundled_model_end_to_end(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    line = "--strategy auto --strategy [2-4-5-6] --strategy sequential --batch-size 2 --batch-size 1 --batch-size 2"
    result = run(f"bench --model digits-p1 {line} --repeats 1 --seed 3 --out {out}")
    assert (result.code, result.err) == (0, "")
    assert sorted(os.listdir(out)) == [".lock", "bench.json", "bench.png", "manifest.json"]
    with Image.open(out / "bench.png") as picture:
        assert picture.width > 900
    entries = figures(out / "bench.json")
    assert (entries["model"], entries["seed"], entries["machine"]) == ("digits-p1", 3, describe_machine())
    assert [entry["batch_size"] for entry in entries["comparisons"]] == [2, 1]
    for entry in entries["comparisons"]:
        assert [row["strategy"] for row in entry["rows"]] == [*BASELINES, "auto", "[2-4-5-6]"]
        table = result.out.partition(f"\nbatch size {entry['batch_size']}\n")[2].splitlines()
        assert max(map(len, table[: 5 + len(entry["rows"])])) <= 80
        lines = [re.split(r" {2,}| (?=\d)", line) for line in table[3 : 3 + len(entry["rows"])]]
        for row, cells in zip(entry["rows"], lines, strict=True):
            assert cells[:2] == [NAMES.get(row["strategy"], row["strategy"]), f"{row['seconds']['median']:.3f}"]
            assert cells[3:5] == [f"{row['speed_up'][name]:.2f}" for name in BASELINES]
        assert lines[3][-1] == f"{entry['rows'][3]['residual']:.1e}*"  # it has no tolerance
    assert result.out.endswith(f"wrote {out}/bench.png and {out}/bench.json\n")


def test_settings_reach_the_library(run: Any, tmp_path: Path) -> None:
    line = "--strategy jacobi --batch-size 3 --repeats 1 --tolerance 1e-6 --report report.json --labels 0,2"
    result = run(f"bench --model model {line} {GUIDED} --dtype float64 --out {tmp_path}")
    assert result.err == ""
    entries, flow = figures(tmp_path / "bench.json"), jf.load("./model", dtype="float64")
    assert (entries["settings"], entries["report"]) == (f"settings: --guidance {GUIDANCE}", "report.json")
    draw = partial(jf.sample, flow.guided(GUIDANCE), 3, torch.tensor([0, 2, 0]))
    plan = jf.Strategy.parse("jacobi", jf.CalibrationReport.load("report.json")).with_tolerance(1e-6)
    rows, exact = rows_of(tmp_path), draw(strategy="sequential").images
    assert rows["jacobi"]["error"] == asdict(sample_errors(draw(strategy=plan).images, exact))
    assert 0 < rows["jacobi"]["residual"] <= 1e-6


def test_a_tolerance_is_that_of_all_strategies(run: Any, refuse: Any, tmp_path: Path) -> None:
    out, planned = tmp_path / "out", tmp_path / "planned.json"
    prediction = Prediction("cpu with 1 thread", 2, None, 1.0, 2.0, 0.0)  # for batches of 2
    replace(jf.Strategy.load("window.json"), prediction=prediction).save(planned)
    line = "bench --model model --batch-size 2 --repeats 1 --strategy"
    names = ("window.json", "auto", "jacobi-2")
    assert run(f"{line} {' --strategy '.join(names)} --tolerance 1e-5 --out {out}").code == 0
    rows = rows_of(out)
    assert max(rows[name]["residual"] for name in names) <= 1e-5
    refuse(f"{line} {planned} --batch-size 4 --out out-x", "the strategy was planned for batch")
