"""A folder of samples: its files, what is read back, which damage is noticed, and what is removed."""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import jacobiflow as jf
from jacobiflow import codec
from jacobiflow.files import write_json
from jacobiflow.latents import draw_latents
from jacobiflow.storage import Cost, SampleFolderError, check
from jacobiflow.strategy import Prediction
from tests.helpers.problems import make_flow
from tests.helpers.sample_folders import everything, flip, invented, manifest_of, pixels_in, read, run
from tests.helpers.scoring import levels

GUIDANCE = jf.Guidance(0.7, annealed=False, on="shift", attn_temperature=0.8)
LABELS = torch.tensor([0, 1, 2, 0, 1, -1, 2, 2, 1, 0])
SPANS = ((0, 4), (4, 8), (8, 10))
DRAWN = invented(draw_latents(10, 4, 4), LABELS, jf.Strategy.uniform(jf.Solver(), 1), lambda *_: None)
LOST = ~DRAWN.images.isfinite().flatten(1).all(dim=1)


@pytest.mark.parametrize("files", ["npz", "png"])
@pytest.mark.parametrize("labels", [LABELS, None], ids=["labels", "none"])
def test_what_was_written_is_read_back(files: Any, labels: Any, tmp_path: Path) -> None:
    written = run(tmp_path, labels=labels, files=files)
    folder = jf.SampleFolder.open(str(tmp_path))
    assert folder == replace(written, drawn=0)
    assert check(tmp_path) == []
    assert 0 < LOST.sum() < 10
    assert np.array_equal(pixels_in(folder), levels(DRAWN.images))
    assert torch.equal(folder.lost(), LOST)
    assert torch.equal(folder.resolved(), DRAWN.stats[0].resolved_sequentially)
    assert torch.equal(folder.certificate(), DRAWN.certificate)  # type: ignore[arg-type]
    for i, (start, stop) in enumerate(SPANS):
        found = folder.labels(i)
        assert found is None if labels is None else torch.equal(found, labels[start:stop])  # type: ignore[arg-type]


def test_an_npz_file_is_the_same_for_the_same_images_and_labels(tmp_path: Path) -> None:
    """So that its checksum depends on no clock and no version of zlib."""
    run(tmp_path, labels=LABELS)
    names = [f"shards/{i:05}.{kind}" for i in range(3) for kind in ("json", "npz")]
    assert list(everything(tmp_path)) == ["manifest.json", *names, "strategy.json"]
    for i, (start, stop) in enumerate(SPANS):
        path = tmp_path / "shards" / f"{i:05}.npz"
        with np.load(path, allow_pickle=False) as arrays:
            assert list(arrays) == ["arr_0", "labels", "certificate", "resolved", "lost"]
            assert (arrays["arr_0"].dtype, arrays["labels"].dtype) == ("u1", "i8")
            assert np.array_equal(arrays["arr_0"], levels(DRAWN.images[start:stop]))
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                assert (entry.compress_type, entry.date_time) == (zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert read(path.with_suffix(".json"))["sha256"] == digest == read(tmp_path / "manifest.json")["checksums"][i]


def test_pngs_lie_by_class_and_index(tmp_path: Path) -> None:
    out = run(tmp_path / "grey", labels=LABELS, files="png").path
    paths = [f"images/{label if label >= 0 else 'none'}/{i:08}.png" for i, label in enumerate(LABELS.tolist())]
    assert sorted(name for name in everything(out) if name.endswith(".png")) == sorted(paths)
    for path, want in zip(paths, levels(DRAWN.images), strict=True):
        with Image.open(out / path) as image:
            assert (image.format, image.mode) == ("PNG", "L")
            assert np.array_equal(np.asarray(image), want[..., 0])
    joined = b"".join((out / path).read_bytes() for path in ("shards/00001.npz", *paths[4:8]))
    assert read(out / "shards" / "00001.json")["sha256"] == hashlib.sha256(joined).hexdigest()
    for num_classes, names in ((10, ["0", "9"]), (11, ["00", "09"]), (101, ["000", "009"])):  # so that they sort
        run(tmp_path / str(num_classes), labels=torch.tensor([0, 9] * 5), files="png", num_classes=num_classes)
        assert sorted(os.listdir(tmp_path / str(num_classes) / "images")) == names


@pytest.mark.parametrize("harm", [flip, Path.unlink])
@pytest.mark.parametrize(
    "files, place", [("npz", "shards/00001.npz"), ("png", "images/2/00000005.png"), ("npz", "shards/00001.json")]
)
def test_a_damaged_shard_is_named(harm: Callable[[Path], None], files: str, place: str, tmp_path: Path) -> None:
    folder = run(tmp_path, files=files)
    assert check(tmp_path) == []
    harm(tmp_path / place)
    assert [folder.verify(i) for i in range(3)] == [True, False, True]
    (problem,) = check(tmp_path)
    want = r"shards/00001\.(json: missing or damaged|npz: does not match its checksum); sample into the folder again"
    assert re.search(want, problem)


def test_a_shard_of_other_samples_is_named(tmp_path: Path) -> None:
    """Though it is whole in itself."""
    run(tmp_path / "a")
    run(tmp_path / "b", seed=1)
    for kind in ("npz", "json"):
        os.replace(tmp_path / "b" / "shards" / f"00001.{kind}", tmp_path / "a" / "shards" / f"00001.{kind}")
    (problem,) = check(tmp_path / "a")
    assert "00001.npz: does not match its checksum" in problem


def test_images_that_are_missing_or_of_another_shape_are_one_clear_error(tmp_path: Path) -> None:
    folder = run(tmp_path)
    path = tmp_path / "shards" / "00000.npz"
    for harm in (lambda: np.savez(path, arr_0=np.zeros((4, 4, 4, 1))), lambda: path.write_bytes(b""), path.unlink):
        harm()
        with pytest.raises(SampleFolderError, match=r"00000\.npz: .*; sample into the folder again with the same"):
            folder.images(0)


def test_the_strategy_is_read_without_its_prediction(tmp_path: Path) -> None:
    planned = replace(
        jf.Strategy.uniform(jf.Solver(jf.Window(4)), 1), prediction=Prediction("cpu", 4, None, 0.1, 0.2, 1e-4, 0.1)
    )
    folder = run(tmp_path, plan=lambda: planned)
    assert (folder.strategy(), folder.strategy().prediction) == (planned, None)
    for harm in (flip, Path.unlink):
        harm(tmp_path / "strategy.json")
        (problem,) = check(tmp_path)
        assert re.search(r"strategy\.json: has changed since its run wrote it; restore it, or", problem)


def test_only_files_of_the_run_are_removed(tmp_path: Path) -> None:
    folder = run(tmp_path, files="png")
    ours = everything(tmp_path)
    half = [f"{name}.{16 * 'a'}.partial" for name in (".manifest.json", "shards/.00001.json", "images/2/.00000002.png")]
    others = ["downloads/.film.mp4.partial", "images/1/00000010.png", "images/1/a.png", "mine.txt",
              "shards/00003.json", "shards/0001.json"]  # fmt: skip
    for name in (*half, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"half")
    folder.remove_partials()
    assert sorted(everything(tmp_path)) == sorted([*others, *ours])
    folder.clear()
    folder.clear()
    assert sorted(everything(tmp_path)) == sorted([*others, "manifest.json"])
    assert sorted(os.listdir(tmp_path / "images")) == ["1"]


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"format_version": 2}, "format_version: Invalid enum value 2"), ({"num": 0}, "num=0: give a positive"),
        ({"batch_size": True}, "batch_size: Expected `int`, got `bool`"), ({"colour": 1}, "'colour' unknown"),
        ({"guidance": {"weight": -1}}, "guidance: guidance weight=-1"),
        ({"shard_size": 3}, "shard_size=3: give a multiple of the batch size, 2"), (None, ""),
    ],
)  # fmt: skip
def test_a_manifest_comes_back_and_a_wrong_one_is_refused(changed: Any, message: str, tmp_path: Path) -> None:
    assert check(tmp_path) == [f"{tmp_path}: no manifest.json in it; give a folder of samples"]
    folder, path = jf.SampleFolder(tmp_path, manifest_of(guidance=GUIDANCE)), tmp_path / "manifest.json"
    folder.save_manifest()
    assert jf.SampleFolder.open(tmp_path) == folder
    path.write_text("{") if changed is None else write_json(path, codec.encode(folder.manifest) | changed)
    with pytest.raises(SampleFolderError, match=rf"manifest\.json: {re.escape(message)}.*; restore it, or move the"):
        jf.SampleFolder.open(tmp_path)
    (problem,) = check(tmp_path)
    assert message in problem


def test_a_run_resumes_with_the_same_settings_only() -> None:
    free: dict[str, Any] = {
        "num": 11, "labels_sha256": "l", "model": "other", "strategy_sha256": "s", "machine": {}, "checksums": ("c",),
    }  # fmt: skip
    begun, out = manifest_of(), Path("out")
    begun.check_resumes(replace(begun, **free), out)
    others = {"seed": 1, "files": "png", "guidance": GUIDANCE, "shard_size": 6, "dtype": "float64", "certify": False}
    for name, value in others.items():
        have = re.escape(repr(getattr(begun, name)))
        with pytest.raises(SampleFolderError, match=rf"^out: holds samples of {name} {have}, not .*; give another fo"):
            begun.check_resumes(replace(begun, **{name: value}), out)
    with pytest.raises(SampleFolderError, match=r"^out: holds a run of 10 samples, more than 9; give num=10; or gi"):
        begun.check_resumes(replace(begun, num=9), out)


def test_costs_are_those_of_the_samples_and_add_up() -> None:
    flow = make_flow(num_classes=3)
    settings: dict[str, Any] = {"strategy": "jacobi-3", "certify": False}
    one, two = (jf.sample(flow, num, torch.zeros(num, dtype=torch.int64), 0, **settings) for num in (2, 3))
    for samples in (one, two):
        cost = Cost.of(samples)
        assert (cost.seconds, cost.network_calls, cost.exact) == (samples.seconds, samples.network_calls, False)
        assert sum(cost.status.values()) == len(samples.images)
        assert cost.sweeps == tuple(block.sweeps for block in samples.stats)
    total = Cost.total([Cost.of(one), Cost.of(two)])
    assert total.token_evaluations == one.token_evaluations + two.token_evaluations
    assert total.sweeps == tuple(a.sweeps + b.sweeps for a, b in zip(one.stats, two.stats, strict=True))
    assert sum(total.status.values()) == 5
    exact = Cost.of(jf.sample(flow, 2, torch.tensor([0, 1]), strategy="sequential"))
    assert (exact.exact, Cost.total([exact, exact]).exact, Cost.total([exact, total]).exact) == (True, True, False)
