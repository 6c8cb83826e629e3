"""Pieces that are registered from outside the package go through every command, as an installed extension."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jacobiflow import codec
from jacobiflow.cli import main
from tests.helpers.problems import make_flow, to_float32

PIECES = ("tests.extending.fraction_window", "tests.extending.scaled_latent", "tests.extending.one_back")
COMMANDS = """
calibrate --model tiny --images images --num 8 --traced 4 --out tiny/report.json
plan --model tiny --batch-size 2 --out plan.json
sample --model tiny --num 4 --strategy made.json --shard-size 2 --batch-size 2 --out samples
sample --model tiny --num 6 --strategy made.json --shard-size 2 --batch-size 2 --out samples --json resumed.json
sample --model tiny --num 2 --strategy auto --out auto
evaluate --model tiny --samples samples --features none --paired 4 --out evaluated
bench --model tiny --strategy fraction:4-2 --batch-size 2 --repeats 1 --out bench
"""


@pytest.fixture(scope="module")
def folder(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The commands' working folder, after they ran with the pieces installed: modules behind an entry point."""
    home = tmp_path_factory.mktemp("pieces")
    to_float32(make_flow(num_classes=3)).save_pretrained(home / "tiny")
    rng = np.random.default_rng(0)
    for i in range(9):
        path = home / "images" / str(i % 3) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(path)
    solver = {
        "partition": {"kind": "fraction", "parts": 4, "least": 2},
        "guess": {"kind": "scaled_latent", "scale": [0.5, 0.5, 0.5, 0.5]},
        "correction": {"kind": "one_back", "gain": 0.25},
        "stopping": {"atol": 1e-4, "max_sweeps": None},
    }
    (home / "made.json").write_text(json.dumps({"format_version": 1, "solvers": [solver] * 2}))
    installed = home / "site" / "pieces-1.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: pieces\nVersion: 1\n")
    (installed / "entry_points.txt").write_text(
        "[jacobiflow]\n" + "".join(f"{name.rpartition('.')[2]} = {name}\n" for name in PIECES)
    )
    families = {base: dict(names) for base, names in codec._families.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "_families", families)  # so that other tests do not see the pieces
        patch.syspath_prepend(home / "site")
        patch.chdir(home)
        for line in COMMANDS.strip().splitlines():
            assert main(shlex.split(line)) == 0
        yield home
    for name in PIECES:
        del sys.modules[name]


def test_samples_go_on_and_are_those_of_the_loop(folder: Path) -> None:
    assert json.loads((folder / "resumed.json").read_text())["drawn"] == 2
    evaluated = json.loads((folder / "evaluated" / "evaluation.json").read_text())
    assert evaluated["certificates"]["max"] <= 1e-4
    assert evaluated["paired"]["max"] < 1e-2


def test_bench_has_its_row(folder: Path) -> None:
    rows = json.loads((folder / "bench" / "bench.json").read_text())["comparisons"][0]["rows"]
    assert [row["strategy"] for row in rows][2:] == ["fraction:4-2"]
    assert next(row for row in rows if row["strategy"] == "fraction:4-2")["error"]["max"] < 1e-2
