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
from sample_folders import flip, manifest_of, partials, read, record_of

import jacobiflow as jf
from jacobiflow.storage import SampleFolderError
from jacobiflow.strategy import Prediction


def pixels(channels: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (10, channels, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def folder_of(path: Path, labels: tuple[int, ...] | None, channels: int = 1, **changed: Any) -> jf.SampleFolder:
    """A whole folder of random images."""
    folder = jf.SampleFolder(path, manifest_of(image_shape=(channels, 4, 4), **changed))
    for i, (start, stop) in enumerate(folder.manifest.spans()):
        part = None if labels is None else labels[start:stop]
        folder.write(i, pixels(channels)[start:stop], record_of(start, stop - start, labels=part, lost=(0,)))
    folder = folder.with_checksums()
    folder.save_manifest()
    return folder


def files(path: Path, under: str) -> list[str]:
    return sorted(str(file.relative_to(path / under)) for file in (path / under).rglob("*") if file.is_file())


LABELS = (0, 1, 2, 0, 1, -1, 2, 2, 1, 0)


@pytest.mark.parametrize("kind", ["npz", "png"])
@pytest.mark.parametrize("channels, labels", [(1, LABELS), (3, None)])
def test_what_was_written_is_read_back(
    kind: str, channels: int, labels: tuple[int, ...] | None, tmp_path: Path
) -> None:
    want = folder_of(tmp_path, labels, channels, files=kind)
    folder = jf.SampleFolder.open(str(tmp_path))
    folder.check()
    assert folder == want
    assert folder.drawn == 0
    assert torch.equal(torch.cat(list(folder.batches())), pixels(channels))
    assert folder.images(2).shape == (2, channels, 4, 4)
    assert folder.images(0).is_contiguous()
    found = [folder.labels(i) for i in range(3)]
    assert [None if part is None else part.tolist() for part in found] == (
        [None] * 3 if labels is None else [[0, 1, 2, 0], [1, -1, 2, 2], [1, 0]]
    )
    assert folder.certificate().tolist() == pytest.approx([0, 1e-4, 2e-4, 3e-4] * 2 + [0, 1e-4])  # type: ignore[union-attr]
    assert folder.lost().nonzero().flatten().tolist() == [0, 4, 8]
    assert folder.manifest.checksums == tuple(record.sha256 for record in folder.records())
    assert folder.size() == sum(file.stat().st_size for file in tmp_path.rglob("*.*")) - os.path.getsize(
        tmp_path / "manifest.json"
    )


def test_the_samples_that_were_solved_again_are_those_of_the_records(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, None, shard_size=5)
    assert folder.resolved().tolist() == [i % 5 == 2 for i in range(10)]


def test_an_npz_file_is_the_same_for_the_same_images_and_labels(tmp_path: Path) -> None:
    """So that its checksum depends on no clock and no version of zlib."""
    folder_of(tmp_path, LABELS)
    assert files(tmp_path, "shards") == [f"{i:05}.{kind}" for i in range(3) for kind in ("json", "npz")]
    for i, (start, stop) in enumerate(((0, 4), (4, 8), (8, 10))):
        path = tmp_path / "shards" / f"{i:05}.npz"
        with np.load(path, allow_pickle=False) as arrays:
            assert set(arrays) == {"arr_0", "labels"}
            assert arrays["arr_0"].dtype == np.uint8
            assert np.array_equal(arrays["arr_0"], pixels().permute(0, 2, 3, 1).numpy()[start:stop])
            assert arrays["labels"].dtype == np.int64
            assert arrays["labels"].tolist() == list(LABELS[start:stop])
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                assert (entry.compress_type, entry.date_time) == (zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0))
        assert read(path.with_suffix(".json"))["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    folder_of(tmp_path / "none", None)
    with np.load(tmp_path / "none" / "shards" / "00000.npz") as arrays:
        assert set(arrays) == {"arr_0"}


def test_pngs_lie_by_class_and_index(tmp_path: Path) -> None:
    folder_of(tmp_path, LABELS, files="png")
    names = ["none" if label < 0 else str(label) for label in LABELS]
    paths = [f"{name}/{i:08}.png" for i, name in enumerate(names)]
    assert files(tmp_path, "images") == sorted(paths)
    assert files(tmp_path, "shards") == [f"{i:05}.json" for i in range(3)]
    for path, want in zip(paths, pixels(), strict=True):
        with Image.open(tmp_path / "images" / path) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "L", (4, 4))
            assert np.array_equal(np.asarray(image), want[0].numpy())
    joined = b"".join((tmp_path / "images" / path).read_bytes() for path in paths[4:8])
    assert read(tmp_path / "shards" / "00001.json")["sha256"] == hashlib.sha256(joined).hexdigest()


def test_folders_of_classes_sort_and_colour_is_kept(tmp_path: Path) -> None:
    for num_classes, names in ((10, ["0", "9"]), (11, ["00", "09"]), (100, ["00", "09"]), (101, ["000", "009"])):
        folder_of(tmp_path / str(num_classes), (0, 9) * 5, files="png", num_classes=num_classes)
        assert sorted(os.listdir(tmp_path / str(num_classes) / "images")) == names
    folder_of(tmp_path / "colour", None, channels=3, files="png")
    assert files(tmp_path / "colour", "images") == [f"{i:08}.png" for i in range(10)]
    with Image.open(tmp_path / "colour" / "images" / "00000007.png") as image:
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), pixels(3)[7].permute(1, 2, 0).numpy())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("kind, place", [("npz", "shards/00001.npz"), ("png", "images/none/00000005.png")])
def test_a_damaged_shard_is_named(harm: Callable[[Path], None], kind: str, place: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, LABELS, files=kind)
    harm(tmp_path / place)
    assert [folder.verify(i) for i in range(3)] == [True, False, True]
    first = place if kind == "npz" else "images/1/00000004.png"
    with pytest.raises(SampleFolderError, match=rf"{first}: does not match its checksum; sample into the folder again"):
        folder.check()


def test_a_shard_other_than_the_one_in_the_manifest_is_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, LABELS)
    checksums = folder.manifest.checksums
    assert checksums is not None
    swapped = replace(folder, manifest=replace(folder.manifest, checksums=(checksums[0], *checksums[:0:-1])))
    with pytest.raises(SampleFolderError, match=r"00001\.npz: does not match its checksum"):
        swapped.check()
    replace(folder, manifest=replace(folder.manifest, checksums=None)).check()


RECORDS: dict[str, str | None] = {
    "missing": None, "empty": "", "half": '{"start": 4, "num"', "no record": "{}", "deep": "[" * 100_000,
    "binary": "\ud800",
}  # fmt: skip


@pytest.mark.parametrize("text", [*RECORDS, "of another shard", "of fewer samples"])
def test_a_shard_without_its_record_does_not_count(text: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, LABELS)
    path = tmp_path / "shards" / "00001.json"
    found = RECORDS.get(text)
    if text == "of another shard":
        shutil.copyfile(tmp_path / "shards" / "00000.json", path)
    elif text == "of fewer samples":
        folder.write(1, pixels()[4:7], record_of(4, 3))
    elif found is None:
        folder.remove(1)
        folder.remove(1)
    else:
        path.write_bytes(found.encode(errors="surrogatepass"))
    assert folder.record(1) is None
    assert not folder.verify(1)
    assert [folder.has(i) for i in range(3)] == [True, text != "missing", True]
    for look in (folder.check, folder.records, folder.certificate, folder.lost, folder.resolved, folder.with_checksums):
        with pytest.raises(
            SampleFolderError, match=r": 1 of 3 shards are missing, 00001\.json for one; sample into it"
        ):
            look()
    for look in (folder.labels, folder.images):
        with pytest.raises(SampleFolderError, match=r"00001\.json: missing; sample into the folder again"):
            look(1)


def test_what_is_not_a_folder_of_samples_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "odd" / "manifest.json").mkdir(parents=True)
    for name, text in (("half", '{"format_version": 1,'), ("deep", "[" * 100_000), ("binary", "\ud800")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_bytes(text.encode(errors="surrogatepass"))
    for name, words in {
        "missing": r"missing: no manifest\.json in it; give a folder of samples$",
        ".": r": no manifest\.json in it; give a folder of samples$",
        "file": r"manifest\.json: cannot be read \(Not a directory\)$",
        "odd": r"manifest\.json: cannot be read \(Is a directory\)$",
        "half": r"manifest\.json: not a manifest of samples \(.+\); restore it, or draw anew with overwrite=True$",
        "deep": r"manifest\.json: not a manifest of samples \(.+\); restore it",
        "binary": r"manifest\.json: not a manifest of samples \(.+\); restore it",
    }.items():
        with pytest.raises(SampleFolderError, match=words):
            jf.SampleFolder.open(tmp_path / name)


def test_the_strategy_is_read_without_its_prediction(tmp_path: Path) -> None:
    prediction = Prediction("cpu", 4, None, 0.1, 0.2, 1e-4, 0.1)
    strategy = replace(jf.Strategy.uniform(jf.Solver(jf.Window(4)), 2), prediction=prediction)
    strategy.save(tmp_path / "strategy.json")
    folder = jf.SampleFolder(tmp_path, manifest_of(strategy_sha256="0" * 64))
    assert folder.strategy() == strategy
    assert folder.strategy().prediction is None
    with pytest.raises(SampleFolderError, match=r": drawn by invented, which is not a strategy$"):
        jf.SampleFolder(tmp_path, manifest_of()).strategy()


def test_samples_without_certificates_have_none(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, None)
    folder.write(1, pixels()[4:8], record_of(certificate=None))
    assert folder.certificate() is None


def test_sweeping_removes_the_partial_files_of_a_run_and_no_others(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, LABELS, files="png")
    ours = (".manifest.json.a1.partial", ".strategy.json.b2.partial", "shards/.00001.json.77.partial",
            "images/.00000001.png.1.partial", "images/2/.00000002.png.77.partial")  # fmt: skip
    others = ("inside/shards/.00001.npz.77.partial", "downloads/.film.mp4.partial", "shards/mine.partial")
    for name in (*ours, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"half")
    folder.sweep()
    assert sorted(str(path.relative_to(tmp_path)) for path in partials(tmp_path)) == sorted(others)
    folder.check()


def test_clearing_removes_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, LABELS, files="png")
    (tmp_path / "strategy.json").write_text("{}")
    (tmp_path / "mine.txt").write_text("not of the run")
    folder.clear()
    folder.clear()
    assert os.listdir(tmp_path) == ["mine.txt"]
