"""A folder of samples: its files, what is read back, which damage is noticed, and what is removed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import jacobiflow as jf
from jacobiflow.jobs import JobFolderError
from jacobiflow.models.latents import draw_latents
from jacobiflow.planner import Prediction
from jacobiflow.sampling.result import Outcome
from tests.helpers.kills import flip, read_files
from tests.helpers.running import figures
from tests.helpers.sample_folders import PLAN, invented, pixels_in, run, shards, tiny_flow
from tests.helpers.scoring import levels

LABELS = torch.tensor([0, 1, 2, 0, 1, -1, 2, 2, 1, 0])
SPANS = ((0, 4), (4, 8), (8, 10))
SAMPLES = invented(SimpleNamespace(context=jf.Context(LABELS)), draw_latents(10, 4, 4))
LOST = ~SAMPLES.images.isfinite().flatten(1).all(dim=1)


@pytest.mark.parametrize("files, labels", [("npz", LABELS), ("png", None)])
def test_samples_are_read_back(files: Any, labels: Any, tmp_path: Path) -> None:
    written = run(tmp_path, labels=labels, files=files)
    folder = jf.SampleFolder.open(str(tmp_path))
    assert folder == replace(written, num_new=0, seconds=0.0, should_print=False)
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
    assert list(shards(tmp_path)) == [
        "manifest.json", "samples.png", *(f"shards/{i:05}.npz" for i in range(3)), "strategy.json"
    ]  # fmt: skip
    for i, (start, stop) in enumerate(SPANS):
        path = tmp_path / "shards" / f"{i:05}.npz"
        with np.load(path, allow_pickle=False) as arrays:
            assert list(arrays) == ["arr_0", "labels", "residual", "used_fallback", "nonfinite"]
            assert (arrays["arr_0"].dtype, arrays["labels"].dtype) == ("u1", "i8")
            assert np.array_equal(arrays["arr_0"], levels(SAMPLES.images[start:stop]))
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                assert (entry.compress_type, entry.date_time) == (zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0))
        record = figures(tmp_path / "units" / f"shard-{i:05}{'-of-2' * (i == 2)}.json")
        assert record["files"] == {f"shards/{i:05}.npz": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_pngs_lie_by_class_and_index(tmp_path: Path) -> None:
    out = run(tmp_path / "grey", labels=LABELS, files="png").path
    paths = [f"images/{label if label >= 0 else 'none'}/{i:08}.png" for i, label in enumerate(LABELS.tolist())]
    assert sorted(name for name in read_files(out) if name.startswith("images")) == sorted(paths)
    for path, want in zip(paths, levels(SAMPLES.images), strict=True):
        with Image.open(out / path) as image:
            assert (image.format, image.mode) == ("PNG", "L")
            assert np.array_equal(np.asarray(image), want[..., 0])
    run(tmp_path / "eleven", labels=torch.tensor([0, 9] * 5), files="png", flow=tiny_flow(num_classes=11))
    assert sorted(os.listdir(tmp_path / "eleven" / "images")) == ["00", "09"]


@pytest.mark.parametrize("place", ["shards/00001.npz", "images/2/00000005.png", "units/shard-00001.json"])
def test_a_damaged_shard_is_named(place: str, tmp_path: Path) -> None:
    folder = run(tmp_path, files="png")
    flip(tmp_path / place)
    (problem,) = folder.problems()
    assert re.search(r"shard-00001 is missing, or does not match its checksum; sample into", problem)


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
    with pytest.raises(JobFolderError, match=rf"00000\.npz: {name} is not .* of shape \(4,.*\); sample into the fol"):
        read(0)


def test_the_strategy_is_read_without_its_prediction(tmp_path: Path) -> None:
    planned = replace(PLAN, prediction=Prediction("cpu", 4, None, 0.1, 0.2, 1e-4))
    folder = run(tmp_path, plan=lambda: planned)
    assert (folder.strategy(), folder.strategy().prediction) == (planned, None)
    flip(tmp_path / "strategy.json")
    with pytest.raises(JobFolderError, match=r"strategy\.json: has changed; restore it, or overwrite the samples"):
        folder.strategy()


def test_only_files_of_the_run_are_removed(tmp_path: Path) -> None:
    run(tmp_path, files="png")
    others = ["downloads/.film.mp4.partial", "images/1/a.png", "mine.txt", "shards/mine.npz"]
    for name in others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"half")
    run(tmp_path, 2, labels=None, overwrite=True)
    names = ("manifest.json", "outcome.json", "samples.png", "shards/00000.npz", "strategy.json", "units/strategy.json")
    assert sorted(read_files(tmp_path)) == sorted([*others, *names, "units/shard-00000-of-2.json"])


def test_a_wrong_manifest_is_refused(tmp_path: Path) -> None:
    run(tmp_path, flow=tiny_flow().guided(jf.Guidance(0.7, annealed=False)))
    path = tmp_path / "manifest.json"
    manifest = figures(path)
    changes: dict[str, dict[str, Any]] = {
        "samples in format 2 of another version of jacobiflow, which this one cannot": {"format_version": 2},
        "has changed since it was written; restore it": {"spec": manifest["spec"] | {"seed": 7}},
    }
    for message, change in changes.items():
        path.write_text(json.dumps(manifest | change))
        with pytest.raises(JobFolderError, match=rf"manifest\.json: {message}"):
            jf.SampleFolder.open(tmp_path)
    path.unlink()
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(JobFolderError, match="no folder of samples; give one that jacobiflow sample wrote"):
            jf.SampleFolder.open(folder)


def test_outcomes_of_shards_add_up(tmp_path: Path) -> None:
    folder, whole = run(tmp_path), SAMPLES.outcome
    assert folder.outcome() == replace(
        whole, seconds=4.5, denoise_seconds=0.75, network_calls=21, token_evaluations=210, sweeps=(15,),
        block_seconds=(1.5,),
    )  # fmt: skip
    exact, blind = replace(whole, is_exact=True), replace(whole, residual=None)
    assert (Outcome.merge([exact, exact]).is_exact, Outcome.merge([exact, whole]).is_exact) == (True, False)
    assert (Outcome.merge([whole, blind]).residual, Outcome.merge([whole, exact]).num) == (None, 20)
    assert str(folder.outcome()).startswith(f"10 samples: {10 - int(LOST.sum())} certified to 1")
