"""`jacobiflow doctor`: every problem of a folder, each on a line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from running import figures
from training_runs import SETTINGS, fit

import jacobiflow as jf
from jacobiflow.experiments.quality import ORIGINAL, Experiment, begin, draw
from jacobiflow.storage import sample_to_folder


def samples(out: Path) -> None:
    sample_to_folder(
        jf.load("./plain"), 4, out, strategy="jacobi-1", batch_size=1, shard_size=2, progress=False
    )  # fmt: skip


def comparison(out: Path) -> None:
    experiment = Experiment(jf.load("./plain"), out, (ORIGINAL, "sequential", "jacobi-1"), batch_size=2, shard_size=2)
    begin(experiment)
    for name in experiment.names[1:]:
        draw(experiment, name, 4, progress=False)


def training(out: Path) -> None:
    fit(out, replace(SETTINGS, steps=1))


# What makes a folder, what is said of a sound one, what to damage, and what is then said of it.
FOLDERS: dict[Callable[[Path], None], tuple[str, str, str]] = {
    samples: ("samples of 4 images, shard by shard\n", "shards/00001.npz", "does not match its checksum; sample into"),
    comparison: ("a comparison of the rows jacobi-1, sequential\n", "rows/jacobi-1/shards/00000.npz", "does not match"),
    training: ("and a training run of a checkpoint and its metrics\n", "checkpoint.pt", "not a checkpoint of this"),
}


@pytest.mark.parametrize("make", FOLDERS)
def test_a_folder_is_sound_until_a_file_is_damaged(make: Callable[[Path], None], run: Any, tmp_path: Path) -> None:
    make(tmp_path / "out")
    sound, damaged, words = FOLDERS[make]
    result = run(f"doctor {tmp_path}/out")
    assert (result.code, result.err) == (0, "")
    assert result.out.endswith(sound)
    file = tmp_path / "out" / damaged
    file.write_bytes(file.read_bytes()[:-9])
    result = run(f"doctor {tmp_path}/out --json {tmp_path}/f")
    assert (result.code, result.err) == (2, "")
    assert f"{file}: {words}" in result.out
    assert figures(tmp_path / "f")["problems"] == result.out.splitlines()
    assert max(map(len, result.out.splitlines())) <= 300


def test_every_problem_has_a_line(run: Any, tmp_path: Path) -> None:
    samples(tmp_path)
    for name in ("shards/00000.npz", "shards/00001.json", "strategy.json"):
        (tmp_path / name).unlink()
    lines = run(f"doctor {tmp_path}").out
    assert all(name in lines for name in ("shards/00000.npz: ", "shards/00001.json: missing", "strategy.json: has"))


def test_a_sound_model(run: Any, tmp_path: Path) -> None:
    result = run(f"doctor digits-p1 --json {tmp_path}/f")
    weights = sum(p.numel() for p in jf.load("digits-p1").parameters())
    assert (result.code, result.err) == (0, "")
    assert result.out == f"digits-p1: no problem; checked a model of {weights:,} weights, by one image there and back\n"
    assert figures(tmp_path / "f")["problems"] == []


def test_a_model_is_used(run: Any, tmp_path: Path) -> None:
    """Its report, and its weights, which may be sound files and useless."""
    flow = jf.load("./plain")
    with torch.no_grad():
        flow.blocks[0].proj_out.bias[:4] = 200  # exp(200) overflows float32
    flow.save_pretrained(tmp_path)
    for name in ("report.json", "report-guided.json"):
        shutil.copy("report.json", tmp_path / name)
    result = run(f"doctor {tmp_path}")
    *reports, images = result.out.splitlines()
    assert (result.code, ["the report is of another flow" in line for line in reports]) == (2, [True, True])
    assert images.startswith(f"{tmp_path}: a latent that is decoded and encoded again is off by nan")


def test_what_is_no_folder_of_ours(refuse: Any) -> None:
    refuse("doctor pets", "pets: no model, samples, comparison or training run; give the folder of one, or a bundled ")
