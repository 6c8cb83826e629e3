"""A folder of samples: the files it consists of, what is read back, and which damage is noticed."""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sample_folders import flip, manifest_of, pixels_in, read, record_of

import jacobiflow as jf
from jacobiflow.storage import SampleFolderError
from jacobiflow.strategy import Prediction

LABELS = (0, 1, 2, 0, 1, -1, 2, 2, 1, 0)
SPANS = ((0, 4), (4, 8), (8, 10))


def images_of(channels: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (10, channels, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def folder_of(
    path: Path, labels: tuple[int, ...] | None = LABELS, channels: int = 1, **changed: Any
) -> jf.SampleFolder:
    """A whole folder of random images."""
    folder = jf.SampleFolder(path, manifest_of(image_shape=(channels, 4, 4), **changed))
    for i, (start, stop) in enumerate(SPANS):
        part = None if labels is None else labels[start:stop]
        folder.write(i, images_of(channels)[start:stop], record_of(start, stop - start, labels=part))
    folder = folder.with_checksums()
    folder.save_manifest()
    return folder


def files(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("kind", ["npz", "png"])
@pytest.mark.parametrize("channels, labels", [(1, LABELS), (3, None)])
def test_what_was_written_is_read_back(
    kind: str, channels: int, labels: tuple[int, ...] | None, tmp_path: Path
) -> None:
    want = folder_of(tmp_path, labels, channels, files=kind)
    folder = jf.SampleFolder.open(str(tmp_path))
    folder.check()
    assert folder == want
    assert np.array_equal(pixels_in(folder), images_of(channels).permute(0, 2, 3, 1).numpy())
    assert folder.images(0).is_contiguous()
    found = [folder.labels(i) for i in range(3)]
    assert [None if part is None else part.tolist() for part in found] == (
        [None] * 3 if labels is None else [[0, 1, 2, 0], [1, -1, 2, 2], [1, 0]]
    )
    certificate = folder.certificate()
    assert certificate is not None
    assert certificate.tolist() == pytest.approx([0, 1e-4, 2e-4, 3e-4, 0, 1e-4, 2e-4, 3e-4, 0, 1e-4])
    assert folder.lost().tolist() == [i in (0, 4, 8) for i in range(10)]
    assert folder.resolved().tolist() == [i in (1, 5, 9) for i in range(10)]
    assert folder.manifest.checksums == tuple(record.sha256 for record in folder.records())
    assert folder.size() == sum((tmp_path / name).stat().st_size for name in files(tmp_path) if name != "manifest.json")
    folder.write(
        1, images_of(channels)[4:8], record_of(certificate=None, labels=None if labels is None else labels[4:8])
    )
    assert folder.certificate() is None


def test_an_npz_file_is_the_same_for_the_same_images_and_labels(tmp_path: Path) -> None:
    """So that its checksum depends on no clock and no version of zlib."""
    folder_of(tmp_path)
    folder_of(tmp_path / "none", None)
    assert files(tmp_path / "shards") == [f"{i:05}.{kind}" for i in range(3) for kind in ("json", "npz")]
    for i, (start, stop) in enumerate(SPANS):
        path = tmp_path / "shards" / f"{i:05}.npz"
        with np.load(path, allow_pickle=False) as arrays:
            assert (set(arrays), arrays["arr_0"].dtype, arrays["labels"].dtype) == ({"arr_0", "labels"}, "u1", "i8")
            assert np.array_equal(arrays["arr_0"], images_of().permute(0, 2, 3, 1).numpy()[start:stop])
            assert arrays["labels"].tolist() == list(LABELS[start:stop])
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                assert (entry.compress_type, entry.date_time) == (zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0))
        assert read(path.with_suffix(".json"))["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        with np.load(tmp_path / "none" / "shards" / path.name) as arrays:
            assert set(arrays) == {"arr_0"}


def test_pngs_lie_by_class_and_index(tmp_path: Path) -> None:
    folder_of(tmp_path, files="png")
    paths = [f"{label if label >= 0 else 'none'}/{i:08}.png" for i, label in enumerate(LABELS)]
    assert files(tmp_path / "images") == sorted(paths)
    assert files(tmp_path / "shards") == [f"{i:05}.json" for i in range(3)]
    for path, want in zip(paths, images_of(), strict=True):
        with Image.open(tmp_path / "images" / path) as image:
            assert (image.format, image.mode) == ("PNG", "L")
            assert np.array_equal(np.asarray(image), want[0].numpy())
    joined = b"".join((tmp_path / "images" / path).read_bytes() for path in paths[4:8])
    assert read(tmp_path / "shards" / "00001.json")["sha256"] == hashlib.sha256(joined).hexdigest()
    for num_classes, names in ((10, ["0", "9"]), (11, ["00", "09"]), (101, ["000", "009"])):  # so that they sort
        folder_of(tmp_path / str(num_classes), (0, 9) * 5, files="png", num_classes=num_classes)
        assert sorted(os.listdir(tmp_path / str(num_classes) / "images")) == names
    folder_of(tmp_path / "colour", None, channels=3, files="png")
    assert files(tmp_path / "colour" / "images") == [f"{i:08}.png" for i in range(10)]
    with Image.open(tmp_path / "colour" / "images" / "00000007.png") as image:
        assert np.array_equal(np.asarray(image), images_of(3)[7].permute(1, 2, 0).numpy())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("kind, place", [("npz", "shards/00001.npz"), ("png", "images/none/00000005.png")])
def test_a_damaged_shard_is_named(harm: Callable[[Path], None], kind: str, place: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, files=kind)
    harm(tmp_path / place)
    assert [folder.verify(i) for i in range(3)] == [True, False, True]
    first = place if kind == "npz" else "images/1/00000004.png"
    with pytest.raises(SampleFolderError, match=rf"{first}: does not match its checksum; sample into the folder again"):
        folder.check()


def test_a_shard_other_than_the_one_in_the_manifest_is_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    one, two, three = folder.manifest.checksums or ()
    replace(folder, manifest=replace(folder.manifest, checksums=None)).check()
    with pytest.raises(SampleFolderError, match=r"00001\.npz: does not match its checksum"):
        replace(folder, manifest=replace(folder.manifest, checksums=(one, three, two))).check()


@pytest.mark.parametrize("text", ["missing", "", '{"start": 4, "num"', "[" * 100_000, "\udcff", "another", "fewer"])
def test_a_shard_without_its_record_does_not_count(text: str, tmp_path: Path) -> None:
    folder, path = folder_of(tmp_path), tmp_path / "shards" / "00001.json"
    if text == "missing":
        folder.remove(1)
        folder.remove(1)
    elif text == "another":
        shutil.copyfile(tmp_path / "shards" / "00000.json", path)
    elif text == "fewer":
        folder.write(1, images_of()[4:7], record_of(4, 3))
    else:
        path.write_text(text, errors="surrogateescape")
    assert folder.record(1) is None
    assert not folder.verify(1)
    assert [folder.has(i) for i in range(3)] == [True, text != "missing", True]
    for look in (folder.check, folder.records, folder.certificate, folder.lost, folder.resolved, folder.with_checksums):
        with pytest.raises(
            SampleFolderError, match=r": 1 of 3 shards are missing, 00001\.json for one; sample into it"
        ):
            look()
    for look_at in (folder.labels, folder.images):
        with pytest.raises(SampleFolderError, match=r"00001\.json: missing; sample into the folder again"):
            look_at(1)


NOT_ONE = r"manifest\.json: not a manifest of samples \(.+\); restore it, or draw anew with overwrite=True$"


@pytest.mark.parametrize(
    "text, words",
    [
        ("missing", r": no manifest\.json in it; give a folder of samples$"),
        ("a folder", r"manifest\.json: cannot be read \(Is a directory\)$"),
        ('{"format_version": 1,', NOT_ONE), ("[" * 100_000, NOT_ONE), ("\udcff", NOT_ONE), ("{}", NOT_ONE),
    ],
)  # fmt: skip
def test_what_is_not_a_folder_of_samples_cannot_be_opened(text: str, words: str, tmp_path: Path) -> None:
    if text == "a folder":
        (tmp_path / "manifest.json").mkdir()
    elif text != "missing":
        (tmp_path / "manifest.json").write_text(text, errors="surrogateescape")
    with pytest.raises(SampleFolderError, match=words):
        jf.SampleFolder.open(tmp_path)


def test_the_strategy_is_read_without_its_prediction(tmp_path: Path) -> None:
    strategy = replace(
        jf.Strategy.uniform(jf.Solver(jf.Window(4)), 2), prediction=Prediction("cpu", 4, None, 0.1, 0.2, 1e-4, 0.1)
    )
    strategy.save(tmp_path / "strategy.json")
    found = jf.SampleFolder(tmp_path, manifest_of(strategy_sha256="0" * 64)).strategy()
    assert (found, found.prediction) == (strategy, None)
    with pytest.raises(SampleFolderError, match=r": drawn by invented, which is not a strategy$"):
        jf.SampleFolder(tmp_path, manifest_of()).strategy()


def test_sweeping_and_clearing_remove_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, files="png")
    (tmp_path / "strategy.json").write_text("{}")
    whole = files(tmp_path)
    ours = [".manifest.json.a1.partial", "shards/.00001.json.77.partial", "images/.00000001.png.1.partial",
            "images/2/.00000002.png.77.partial"]  # fmt: skip
    others = ["downloads/.film.mp4.partial", "inside/shards/.00001.npz.77.partial", "mine.txt"]
    for name in (*ours, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"half")
    folder.sweep()
    assert files(tmp_path) == sorted([*others, *whole])
    folder.clear()
    folder.clear()
    assert files(tmp_path) == others
    assert sorted(os.listdir(tmp_path)) == ["downloads", "inside", "mine.txt"]
