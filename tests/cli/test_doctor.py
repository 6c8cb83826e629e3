"""`jacobiflow doctor`: every problem of a folder, each on a line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from running import figures

import jacobiflow as jf
from jacobiflow import flows, storage, training
from jacobiflow.experiments import quality
from jacobiflow.storage import sample_to_folder

PARTS = (flows, storage, training, quality)
REAL = {part: part.problems for part in PARTS}


@pytest.fixture(autouse=True)
def sound(monkeypatch: pytest.MonkeyPatch) -> None:
    """No part finds anything wrong with its files."""
    for part in PARTS:
        monkeypatch.setattr(part, "problems", lambda path: [], raising=False)


def test_a_sound_model(run: Any, tmp_path: Path) -> None:
    result = run(f"doctor digits-p1 --json {tmp_path}/f")
    weights = sum(p.numel() for p in jf.load("digits-p1").parameters())
    assert (result.code, result.err) == (0, "")
    assert result.out == f"digits-p1: no problem; checked a model of {weights:,} weights, by one image there and back\n"
    assert figures(tmp_path / "f")["problems"] == []


def test_sound_folders_of_other_commands(run: Any, tmp_path: Path) -> None:
    sample_to_folder(
        jf.load("./plain"), 4, tmp_path / "rows/jacobi-1", strategy="jacobi-1", batch_size=1, shard_size=2,
        progress=False,
    )  # fmt: skip
    assert "checked samples of 4 images in 2 shards\n" in run(f"doctor {tmp_path}/rows/jacobi-1").out
    assert "checked a comparison of 1 rows of samples\n" in run(f"doctor {tmp_path}").out
    (tmp_path / "checkpoint.pt").touch()
    assert run(f"doctor {tmp_path}").out.endswith("and a training run of a checkpoint and its metrics\n")


def test_all_problems_of_all_that_a_folder_is(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in PARTS:
        found = [f"{part.__name__} x: restore it", "long\n" * 200]
        monkeypatch.setattr(part, "problems", lambda path, found=found: iter(found))
    for name in ("config.json", "manifest.json", "settings.json", "checkpoint.pt"):
        (tmp_path / name).touch()
    result, lines = run(f"doctor {tmp_path} --json {tmp_path}/f"), 2 * len(PARTS)
    assert (result.code, result.err, result.out.count("\n")) == (2, "", lines)
    assert all(f"{part.__name__} x: restore it\n" in result.out for part in PARTS)
    assert max(map(len, result.out.splitlines())) <= 300
    assert figures(tmp_path / "f")["problems"] == result.out.splitlines()


def test_a_model_is_used(run: Any, tmp_path: Path) -> None:
    """Its report, and its weights, which may be sound files and useless."""
    flow = jf.load("./plain")
    with torch.no_grad():
        flow.blocks[0].proj_out.bias[:4] = 200  # exp(200) overflows float32
    flow.save_pretrained(tmp_path)
    shutil.copy("report.json", tmp_path)
    result = run(f"doctor {tmp_path}")
    report, images = result.out.splitlines()
    assert (result.code, "the report is of another flow" in report) == (2, True)
    assert images.startswith(f"{tmp_path}: a latent that is decoded and encoded again is off by nan")


def test_what_is_no_folder_of_ours(refuse: Any) -> None:
    refuse("doctor pets", "pets: no model, samples, comparison or training run; give the folder of one, or a bundled ")


def test_a_damaged_shard_is_found_by_the_parts_themselves(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sample_to_folder(jf.load("plain"), 4, tmp_path, strategy="jacobi-1", batch_size=2, progress=False)
    shard = folder.path / "shards" / "00000.npz"
    with monkeypatch.context() as patch:
        for part in PARTS:
            patch.setattr(part, "problems", REAL[part])
        assert run(f"doctor {tmp_path}").code == 0
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
        result = run(f"doctor {tmp_path}")
    assert (result.code, result.err) == (2, "")
    assert result.out.startswith(f"{shard}: does not match its checksum; sample into the folder again")
