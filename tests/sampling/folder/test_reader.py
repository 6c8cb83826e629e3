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
from jacobiflow.models.latents import draw_latents
from jacobiflow.planner import Prediction
from jacobiflow.sampling.folder import Cost, SampleFolderError
from jacobiflow.utils import serialization
from jacobiflow.utils.files import write_json
from tests.helpers.running import figures
from tests.helpers.sample_folders import PLAN, everything, flip, invented, pixels_in, run, tiny_flow
from tests.helpers.scoring import levels

LABELS = torch.tensor([0, 1, 2, 0, 1, -1, 2, 2, 1, 0])
SPANS = ((0, 4), (4, 8), (8, 10))
SAMPLES = invented(None, None, draw_latents(10, 4, 4), jf.Context(LABELS), None, None, None)
LOST = ~SAMPLES.images.isfinite().flatten(1).all(dim=1)


@pytest.mark.parametrize("files, labels", [("npz", LABELS), ("png", None)])
def test_samples_are_read_back(files: Any, labels: Any, tmp_path: Path) -> None:
    written = run(tmp_path, labels=labels, files=files)
    folder = jf.SampleFolder.open(str(tmp_path))
    assert folder == replace(written, num_new=0, seconds=0.0)
    assert folder.problems() == []
    assert 0 < LOST.sum() < 10
    assert np.array_equal(pixels_in(folder), levels(SAMPLES.images))
    assert torch.equal(folder.nonfinite(), LOST)
    assert torch.equal(folder.used_fallback(), SAMPLES.stats[0].used_fallback)
    assert torch.equal(folder.residual(), SAMPLES.residual)  # type: ignore[arg-type]
    for i, (start, stop) in enumerate(SPANS):
        part = folder.labels(i)
        assert part is None if labels is None else torch.equal(part, labels[start:stop])  # type: ignore[arg-type]


def test_an_npz_file_depends_on_no_clock_and_no_version_of_zlib(tmp_path: Path) -> None:
    run(tmp_path, labels=LABELS)
    names = [f"shards/{i:05}.{kind}" for i in range(3) for kind in ("json", "npz")]
    assert list(everything(tmp_path)) == ["manifest.json", *names, "strategy.json"]
    for i, (start, stop) in enumerate(SPANS):
        path = tmp_path / "shards" / f"{i:05}.npz"
        with np.load(path, allow_pickle=False) as arrays:
            assert list(arrays) == ["arr_0", "labels", "residual", "used_fallback", "nonfinite"]
            assert (arrays["arr_0"].dtype, arrays["labels"].dtype) == ("u1", "i8")
            assert np.array_equal(arrays["arr_0"], levels(SAMPLES.images[start:stop]))
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                assert (entry.compress_type, entry.date_time) == (zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert figures(path.with_suffix(".json"))["sha256"] == digest
        assert figures(tmp_path / "manifest.json")["checksums"][i] == digest


def test_pngs_lie_by_class_and_index(tmp_path: Path) -> None:
    out = run(tmp_path / "grey", labels=LABELS, files="png").path
    paths = [f"images/{label if label >= 0 else 'none'}/{i:08}.png" for i, label in enumerate(LABELS.tolist())]
    assert sorted(name for name in everything(out) if name.endswith(".png")) == sorted(paths)
    for path, want in zip(paths, levels(SAMPLES.images), strict=True):
        with Image.open(out / path) as image:
            assert (image.format, image.mode) == ("PNG", "L")
            assert np.array_equal(np.asarray(image), want[..., 0])
    joined = b"".join((out / path).read_bytes() for path in ("shards/00001.npz", *paths[4:8]))
    assert figures(out / "shards" / "00001.json")["sha256"] == hashlib.sha256(joined).hexdigest()
    run(tmp_path / "eleven", labels=torch.tensor([0, 9] * 5), files="png", flow=tiny_flow(num_classes=11))
    assert sorted(os.listdir(tmp_path / "eleven" / "images")) == ["00", "09"]


@pytest.mark.parametrize("harm", [flip, Path.unlink])
@pytest.mark.parametrize(
    "files, place", [("npz", "shards/00001.npz"), ("png", "images/2/00000005.png"), ("npz", "shards/00001.json")]
)
def test_a_damaged_shard_is_named(harm: Callable[[Path], None], files: str, place: str, tmp_path: Path) -> None:
    folder = run(tmp_path, files=files)
    harm(tmp_path / place)
    assert [folder.verify(i) for i in range(3)] == [True, False, True]
    (problem,) = folder.problems()
    assert re.search(r"shards/00001\.(json: missing or damaged|npz: does not match its checksum); sample into", problem)


def test_an_intact_shard_of_other_samples_is_named(tmp_path: Path) -> None:
    folder = run(tmp_path / "a")
    run(tmp_path / "b", seed=1)
    for kind in ("npz", "json"):
        os.replace(tmp_path / "b" / "shards" / f"00001.{kind}", tmp_path / "a" / "shards" / f"00001.{kind}")
    (problem,) = folder.problems()
    assert "00001.npz: does not match its checksum" in problem


def test_labels_that_are_not_those_of_the_manifest_are_named(tmp_path: Path) -> None:
    folder = run(tmp_path, labels=LABELS)
    for checksum in ("0" * 64, None):
        replace(folder, manifest=replace(folder.manifest, context_sha256=checksum)).save_manifest()
        (problem,) = jf.SampleFolder.open(tmp_path).problems()
        assert problem == f"{tmp_path}/manifest.json: context_sha256 is not that of the labels; restore the file"


HARM: dict[str, Any] = {
    "residual": torch.zeros(5).numpy(), "used_fallback": None, "nonfinite": np.zeros(4, np.float32),
    "labels": np.zeros((4, 1), int), "log_prob": np.zeros(3, np.float32), "arr_0": np.zeros((4, 4, 4, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", HARM)
def test_an_array_that_does_not_fit_its_shard_is_one_clear_error(name: str, tmp_path: Path) -> None:
    folder, path = run(tmp_path), tmp_path / "shards" / "00000.npz"
    with np.load(path) as arrays:
        np.savez(path, **{key: value for key, value in {**arrays, name: HARM[name]}.items() if value is not None})
    read = {"labels": folder.labels, "arr_0": folder.images}.get(name, lambda _: getattr(folder, name)())
    with pytest.raises(
        SampleFolderError, match=rf"00000\.npz: {name} is not .* of shape \(4,.*\); sample into the fol"
    ):
        read(0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name")
def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    """It would wait for a writer without end."""
    folder = run(tmp_path)
    for name in ("shards/00000.npz", "shards/00001.json", "strategy.json", "manifest.json"):
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
    assert [("missing or damaged" in each, "checksum" in each) for each in folder.problems()] == [
        (False, False), (False, True), (True, False)
    ]  # fmt: skip
    with pytest.raises(SampleFolderError, match=r"manifest\.json: cannot be read \(Not a regular file\)"):
        jf.SampleFolder.open(tmp_path)


def test_the_strategy_is_read_without_its_prediction(tmp_path: Path) -> None:
    planned = replace(PLAN, prediction=Prediction("cpu", 4, None, 0.1, 0.2, 1e-4, 0.1))
    folder = run(tmp_path, plan=lambda: planned)
    assert (folder.strategy(), folder.strategy().prediction) == (planned, None)
    for harm in (flip, Path.unlink):
        harm(tmp_path / "strategy.json")
        (problem,) = folder.problems()
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
    assert sorted(everything(tmp_path)) == sorted([*others, "manifest.json"])
    assert sorted(os.listdir(tmp_path / "images")) == ["1"]


def test_a_wrong_manifest_is_refused(tmp_path: Path) -> None:
    folder, path = run(tmp_path, flow=tiny_flow().guided(jf.Guidance(0.7, annealed=False))), tmp_path / "manifest.json"
    assert jf.SampleFolder.open(tmp_path).manifest == folder.manifest
    changes: dict[str, dict[str, Any]] = {
        "format_version: Invalid enum value 3": {"format_version": 3},
        "num: Expected `int` >= 1": {"num": 0},
        "num: Expected `int` <= 100000000": {"num": 10**12},
        "shard_size=1: 1,000,000 shards; give a larger one": {"num": 10**6, "shard_size": 1},
        "'colour' unknown": {"colour": 1},
        "guidance: guidance weight=-1": {"guidance": {"weight": -1}},
    }
    for message, change in changes.items():
        write_json(path, serialization.encode(folder.manifest) | change)
        with pytest.raises(SampleFolderError, match=rf"manifest\.json: {re.escape(message)}.*; restore it, or give an"):
            jf.SampleFolder.open(tmp_path)
    path.unlink()
    with pytest.raises(SampleFolderError, match=r"manifest\.json: cannot be read .*; restore it, or give another"):
        jf.SampleFolder.open(tmp_path)


def test_costs_of_shards_add_up(tmp_path: Path) -> None:
    num_lost, num_resolved = int(LOST.sum()), int(SAMPLES.stats[0].used_fallback.sum())
    status = {"converged": 10 - num_lost, "nonfinite": num_lost} | dict.fromkeys(("max_sweeps", "rounding"), 0)
    cost = Cost(1.5, 0.25, 7, 70, num_resolved, False, status, (5,), (0.5,))
    assert Cost.of(SAMPLES) == cost
    folder = run(tmp_path)
    assert folder.cost() == replace(
        cost, seconds=4.5, denoise_seconds=0.75, network_calls=21, token_evaluations=210, sweeps=(15,),
        block_seconds=(1.5,),
    )  # fmt: skip
    exact = replace(cost, is_exact=True)
    assert (Cost.total([exact, exact]).is_exact, Cost.total([exact, cost]).is_exact) == (True, False)
    assert str(folder.outcome()).startswith(f"10 samples: {10 - num_lost} certified to 0.001")
    (tmp_path / "shards" / "00001.json").unlink()
    with pytest.raises(SampleFolderError, match=r": 1 of 3 shards are missing; sample into the folder again"):
        folder.cost()
