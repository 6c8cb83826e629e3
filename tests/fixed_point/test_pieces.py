"""Pieces that are registered from outside the package go through every command, as an installed extension."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jacobiflow.cli import main
from jacobiflow.fixed_point import registry
from tests.helpers.problems import make_flow, to_float32

PIECES = ("examples.extending.fraction_window", "examples.extending.scaled_latent")
COMMANDS = """
calibrate --model tiny --images images --num 8 --convergence-samples 4 --out calibration
plan --model tiny --batch-size 2 --out plan.json
sample --model tiny --num 4 --strategy made.json --batch-size 2 --out samples
sample --model tiny --num 2 --strategy jacobi --report calibration/report.json --out jacobi
evaluate --model tiny --samples samples --features none --paired 4 --out evaluated
bench --model tiny --strategy fraction:4-2 --batch-size 2 --repeats 1 --out bench
"""


@pytest.mark.usefixtures("one_thread")
def test_every_command_takes_pieces_that_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to_float32(make_flow(num_classes=3)).save_pretrained(tmp_path / "tiny")
    rng = np.random.default_rng(0)
    for i in range(9):
        path = tmp_path / "images" / str(i % 3) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(path)
    solver = {
        "partition": {"kind": "fraction", "parts": 4, "least": 2},
        "guess": {"kind": "scaled_latent", "scale": [0.5, 0.5, 0.5, 0.5]},
    }
    made = {"format_version": 3, "solvers": [solver] * 2, "tolerance": 1e-4}
    (tmp_path / "made.json").write_text(json.dumps(made))
    installed = tmp_path / "site" / "pieces-1.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: pieces\nVersion: 1\n")
    (installed / "entry_points.txt").write_text(
        "[jacobiflow]\n" + "".join(f"{name.rpartition('.')[2]} = {name}\n" for name in PIECES)
    )
    monkeypatch.chdir(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_pieces", dict(registry._pieces))  # so that other tests do not see the pieces
        patch.syspath_prepend(tmp_path / "site")
        for line in COMMANDS.strip().splitlines():
            assert main(shlex.split(line)) == 0
    for name in PIECES:
        del sys.modules[name]
    evaluated = json.loads(Path("evaluated/evaluation.json").read_text())
    assert evaluated["samples"]["residual"] <= 1e-4
    assert evaluated["scores"]["paired"]["max"] < 1e-2
    row = json.loads(Path("bench/bench.json").read_text())["comparisons"][0]["rows"][2]
    assert row["error"]["max"] < 1e-2
