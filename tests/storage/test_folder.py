"""A folder of samples: its manifest, its records, its files, what is read back, and which damage is noticed."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from problems import make_flow
from sample_folders import digest_of, everything, flip, manifest_of, pixels_in, read, record_of, signed

import jacobiflow as jf
from jacobiflow.locking import locked
from jacobiflow.measuring import machine
from jacobiflow.storage import Manifest, SampleFolderError, problems
from jacobiflow.storage.record import Record
from jacobiflow.strategy import Prediction

GUIDANCE = jf.Guidance(0.7, annealed=False, on="shift", attn_temperature=0.8)
NAMES = [entry.name for entry in fields(Manifest)]
SHA = 64 * "a"
LABELS = (0, 1, 2, 0, 1, -1, 2, 2, 1, 0)
SPANS = ((0, 4), (4, 8), (8, 10))


def images_of(channels: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (10, channels, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def folder_of(
    path: Path, labels: tuple[int, ...] | None = LABELS, channels: int = 1, **changed: Any
) -> jf.SampleFolder:
    """A whole folder of random images."""
    folder = jf.SampleFolder(
        path, manifest_of(image_shape=(channels, 4, 4), labels_sha256=digest_of(labels), **changed)
    )
    for i, (start, stop) in enumerate(SPANS):
        record = record_of(start, stop - start, labels=None if labels is None else labels[start:stop])
        folder.write(i, images_of(channels)[start:stop], record)
    folder = folder.with_checksums()
    folder.save_manifest()
    return folder


@pytest.mark.parametrize("kind", ["npz", "png"])
@pytest.mark.parametrize("channels, labels", [(1, LABELS), (3, None)])
def test_what_was_written_is_read_back(kind: str, channels: int, labels: Any, tmp_path: Path) -> None:
    want = folder_of(tmp_path, labels, channels, files=kind)
    folder = jf.SampleFolder.open(str(tmp_path))
    folder.check()
    assert folder == want
    assert np.array_equal(pixels_in(folder), images_of(channels).permute(0, 2, 3, 1).numpy())
    found = [None if part is None else tuple(part.tolist()) for part in map(folder.labels, range(3))]
    assert found == [None if labels is None else labels[start:stop] for start, stop in SPANS]
    certificate = folder.certificate()
    assert certificate is not None
    assert certificate.tolist() == pytest.approx([0, 1e-4, 2e-4, 3e-4, 0, 1e-4, 2e-4, 3e-4, 0, 1e-4])
    assert folder.lost().tolist() == [i in (0, 4, 8) for i in range(10)]
    assert folder.resolved().tolist() == [i in (1, 5, 9) for i in range(10)]
    assert folder.manifest.checksums == tuple(record.sha256 for record in folder.records())
    assert folder.size() == sum(len(data) for name, data in everything(tmp_path).items() if name != "manifest.json")
    folder.write(1, images_of(channels)[4:8], record_of(certificate=None, labels=found[1]))
    assert folder.certificate() is None


def test_an_npz_file_is_the_same_for_the_same_images_and_labels(tmp_path: Path) -> None:
    """So that its checksum depends on no clock and no version of zlib."""
    folder_of(tmp_path / "labelled")
    folder_of(tmp_path / "none", None)
    names = [f"shards/{i:05}.{kind}" for i in range(3) for kind in ("json", "npz")]
    assert list(everything(tmp_path / "labelled")) == ["manifest.json", *names]
    for i, (start, stop) in enumerate(SPANS):
        path = tmp_path / "labelled" / "shards" / f"{i:05}.npz"
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
    out = folder_of(tmp_path / "grey", files="png").path
    paths = [f"images/{label if label >= 0 else 'none'}/{i:08}.png" for i, label in enumerate(LABELS)]
    assert sorted(everything(out)) == [*sorted(paths), "manifest.json", *(f"shards/{i:05}.json" for i in range(3))]
    for path, want in zip(paths, images_of(), strict=True):
        with Image.open(out / path) as image:
            assert (image.format, image.mode) == ("PNG", "L")
            assert np.array_equal(np.asarray(image), want[0].numpy())
    joined = b"".join((out / path).read_bytes() for path in paths[4:8])
    assert read(out / "shards" / "00001.json")["sha256"] == hashlib.sha256(joined).hexdigest()
    for num_classes, names in ((10, ["0", "9"]), (11, ["00", "09"]), (101, ["000", "009"])):  # so that they sort
        folder_of(tmp_path / str(num_classes), (0, 9) * 5, files="png", num_classes=num_classes)
        assert sorted(os.listdir(tmp_path / str(num_classes) / "images")) == names
    folder_of(tmp_path / "colour", None, channels=3, files="png")
    with Image.open(tmp_path / "colour" / "images" / "00000007.png") as image:
        assert np.array_equal(np.asarray(image), images_of(3)[7].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("harm", [flip, Path.unlink])
@pytest.mark.parametrize("kind, place", [("npz", "shards/00001.npz"), ("png", "images/none/00000005.png")])
def test_a_damaged_shard_is_named(harm: Callable[[Path], None], kind: str, place: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, files=kind)
    one, two, three = folder.manifest.checksums or ()
    replace(folder, manifest=replace(folder.manifest, checksums=None)).check()
    another = replace(folder, manifest=replace(folder.manifest, checksums=(one, three, two)))
    words = rf"{place if kind == 'npz' else 'images/1/00000004.png'}: does not match its checksum; sample into the fol"
    with pytest.raises(SampleFolderError, match=words):
        another.check()
    harm(tmp_path / place)
    assert [folder.verify(i) for i in range(3)] == [True, False, True]
    with pytest.raises(SampleFolderError, match=words):
        folder.check()


@pytest.mark.parametrize("text", ["missing", '{"start": 4, "num"', "[" * 100_000, "another", "fewer"])
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
        path.write_text(text)
    assert folder.record(1) is None
    assert not folder.verify(1)
    assert [folder.has(i) for i in range(3)] == [True, text != "missing", True]
    words = r": 1 of 3 shards are missing, 00001\.json for one; sample into it"
    for look in (folder.check, folder.records, folder.certificate, folder.lost, folder.resolved, folder.with_checksums):
        with pytest.raises(SampleFolderError, match=words):
            look()
    for look_at in (folder.labels, folder.images):
        with pytest.raises(SampleFolderError, match=r"00001\.json: missing; sample into the folder again"):
            look_at(1)


def test_what_is_not_a_folder_of_samples_cannot_be_opened(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    with pytest.raises(TypeError, match=r"^path=5 of type int: give a path$"):
        jf.SampleFolder.open(5)  # type: ignore[arg-type]
    with pytest.raises(SampleFolderError, match=r": no manifest\.json in it; give a folder of samples$"):
        jf.SampleFolder.open(tmp_path)
    words = r"manifest\.json: not a manifest of samples \(.+\); restore it, or move the folder away$"
    for text in ('{"format_version": 1,', "[" * 100_000, "{}"):
        path.write_text(text)
        with pytest.raises(SampleFolderError, match=words):
            jf.SampleFolder.open(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(SampleFolderError, match=r"manifest\.json: cannot be read \(Not a regular file\)$"):
        jf.SampleFolder.open(tmp_path)


def test_the_strategy_is_read_without_its_prediction(tmp_path: Path) -> None:
    strategy = replace(
        jf.Strategy.uniform(jf.Solver(jf.Window(4)), 2), prediction=Prediction("cpu", 4, None, 0.1, 0.2, 1e-4, 0.1)
    )
    strategy.save(tmp_path / "strategy.json")
    digest = hashlib.sha256((tmp_path / "strategy.json").read_bytes()).hexdigest()
    found = jf.SampleFolder(tmp_path, manifest_of(strategy_sha256=digest)).strategy()
    assert (found, found.prediction) == (strategy, None)
    with pytest.raises(SampleFolderError, match=r"strategy\.json: has changed since its run wrote it; restore it, or"):
        jf.SampleFolder(tmp_path, manifest_of(strategy_sha256=64 * "0")).strategy()
    with pytest.raises(SampleFolderError, match=r": drawn by invented, which is not a strategy$"):
        jf.SampleFolder(tmp_path, manifest_of()).strategy()


def test_sweeping_and_clearing_remove_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, files="png")
    (tmp_path / "strategy.json").write_text("{}")
    whole = list(everything(tmp_path))
    ours = [f"{name}.{16 * 'a'}.partial" for name in (
        ".manifest.json", "shards/.00001.json", "images/2/.00000002.png"
    )]  # fmt: skip
    others = ["downloads/.film.mp4.partial", "images/1/00000010.png", "images/1/a.png", "images/00000001.png",
              "images/3/00000001.png", f"inside/shards/.00001.npz.{16 * 'a'}.partial", "mine.txt", "shards/00000.npz",
              "shards/00003.json", "shards/0001.json"]  # fmt: skip
    for name in (*ours, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"half")
    folder.sweep()
    assert sorted(everything(tmp_path)) == sorted([*others, *whole])
    folder.clear()
    folder.clear()
    assert sorted(everything(tmp_path)) == sorted([*others, "manifest.json"])  # or shards/ would be taken for theirs
    assert sorted(os.listdir(tmp_path / "images")) == ["00000001.png", "1", "3"]


def test_a_manifest_says_what_is_drawn() -> None:
    flow, labels = make_flow(in_channels=3, image_size=4, num_classes=5), torch.tensor([1, -1, 4])
    given: dict[str, Any] = {"batch_size": 2, "shard_size": 4, "strategy": "jacobi", "certify": False, "model": "mine"}
    manifest = Manifest.of(flow, 3, labels, 9, guidance=GUIDANCE, denoise=1, tolerance=1e-4, files="png", **given)
    assert asdict(manifest) == given | {
        "num": 3, "image_shape": (3, 4, 4), "seed": 9, "labels_sha256": digest_of((1, -1, 4)), "num_classes": 5,
        "files": "png", "fingerprint": manifest.fingerprint, "dtype": "float64", "strategy_sha256": None,
        "guidance": asdict(GUIDANCE), "denoise": 1.0, "tolerance": 1e-4, "machine": machine("cpu"), "checksums": None,
    }  # fmt: skip
    assert len(manifest.fingerprint) == 64
    off = Manifest.of(flow, 3, None, 9, guidance=jf.Guidance(0.0), denoise=0.0, **given)
    assert (off.guidance, off.labels_sha256, off.tolerance, off.files) == (None, None, None, "npz")


def test_json_gives_a_manifest_back() -> None:
    for manifest in (
        manifest_of(1, batch_size=1, shard_size=1, image_shape=(1, 1, 1), num_classes=0, denoise=1, checksums=(SHA,)),
        manifest_of(files="png", guidance=asdict(GUIDANCE), checksums=(SHA, SHA, SHA)),
    ):
        value = json.loads(json.dumps(manifest.to_json()))
        assert next(iter(value.items())) == ("format_version", 1)
        assert list(value)[1:] == [*NAMES, "manifest_sha256"]
        entries = {name: entry for name, entry in value.items() if name != "manifest_sha256"}
        canonical = json.dumps(entries, sort_keys=True).encode()
        assert value["manifest_sha256"] == hashlib.sha256(canonical).hexdigest()
        assert Manifest.from_json(value) == Manifest.from_json(entries) == manifest  # earlier versions had no checksum
    assert [manifest.span(index) for index in range(manifest.num_shards)] == [(0, 4), (4, 8), (8, 10)]
    assert [manifest.num_in(some) for some in ([], [2], (0, 2))] == [0, 2, 6]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"format_version": 2}, "format_version is 2, not 1"), ({"num": 0}, "num is 0"), ({"num": "10"}, "num is '10'"),
    ({"batch_size": True}, "batch_size is True"), ({"shard_size": 2.0}, "shard_size is 2.0"),
    ({"image_shape": [1, 8]}, "image_shape is (1, 8)"), ({"image_shape": [1, 0, 8]}, "image_shape is (1, 0, 8)"),
    ({"image_shape": [1, 4, 4, 4]}, "image_shape is (1, 4, 4, 4)"), ({"image_shape": 8}, "image_shape is 8"),
    ({"seed": -1}, "seed is -1"), ({"num_classes": -1}, "num_classes is -1"),
    ({"files": "bmp"}, "files is 'bmp'"), ({"guidance": 0.5}, "guidance is 0.5"), ({"denoise": "0"}, "denoise is '0'"),
    ({"machine": None}, "machine is None"), ({"checksums": "abc"}, "checksums is 'abc'"),
    ({"checksums": [1]}, "checksums is (1,)"), ({"checksums": [SHA, SHA]}, "2 checksums of 3 shards"),
    ({"checksums": ["a", "b", "c"]}, "checksums is ('a', 'b', 'c')"), ({"fingerprint": "f"}, "fingerprint is 'f'"),
    ({"labels_sha256": ""}, "labels_sha256 is ''"), ({"strategy_sha256": 1}, "strategy_sha256 is 1"),
    ({"guidance": {"weight": -1}}, "guidance is {'weight': -1}"), ({"denoise": math.nan}, "denoise is nan"),
    ({"tolerance": -1}, "tolerance is -1"), ({"certify": 1}, "certify is 1"), ({"model": 1}, "model is 1"),
    ({"shard_size": 3}, "shard_size is 3, no multiple of batch_size, 2"),
    ({"num": 10**12, "batch_size": 1, "shard_size": 1}, "1,000,000,000,000 samples: the limit is 100,000,000; give few"
     "er"),
    ({"num": 10**8}, "25,000,000 shards: the limit is 1,000,000; give a larger shard size"),
    ({"image_shape": [1, 2**16, 2**16]}, "17,179,869,184 bytes of images in a shard: the limit is 4,294,967,296; give a"
     " smaller shard size"),
    ({"seed": 1}, "does not match its own checksum: an entry was changed"),
    ({"labels_sha256": SHA}, "does not match its own checksum: an entry was changed"),
    ({"colour": 1}, "colour is unknown"), ({"seed": ...}, "seed is missing"),
    ({"format_version": ...}, "format_version is None, not 1"),
]  # fmt: skip


def test_a_wrong_manifest_is_refused() -> None:
    for changed, words in WRONG:
        value = {name: entry for name, entry in (manifest_of().to_json() | changed).items() if entry is not ...}
        with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
            Manifest.from_json(value)
    with pytest.raises(ValueError, match=r"^\[\] is not a JSON object$"):
        Manifest.from_json([])


def test_a_run_resumes_with_the_same_settings_only() -> None:
    free: dict[str, Any] = {
        "num": 11, "labels_sha256": "l", "model": "other", "strategy_sha256": "s", "machine": {}, "checksums": ("c",),
    }  # fmt: skip
    begun, out = manifest_of(fingerprint="f"), Path("out")
    begun.check_resumes(replace(begun, **free), out)
    for name in set(NAMES) - set(free):
        with pytest.raises(SampleFolderError) as error:
            begun.check_resumes(replace(begun, **{name: "another"}), out)
        words = f"out: holds samples of {name} {getattr(begun, name)}, not another; "
        assert str(error.value) == f"{words}give another folder, or overwrite=True to replace them"
    with pytest.raises(SampleFolderError, match=r"^out: holds a run of 10 samples, more than 9; give num=10; or gi"):
        begun.check_resumes(replace(begun, num=9), out)
    for length, shown in ((60, "x" * 60), (61, "x" * 57 + "...")):  # long values are cut
        with pytest.raises(SampleFolderError, match=f"strategy {shown}, not invented"):
            replace(begun, strategy="x" * length).check_resumes(begun, out)


def test_json_gives_a_record_back_in_any_order() -> None:
    for record in (
        record_of(labels=None, certificate=None, resolved=(), lost=(), figures={}),
        record_of(labels=(-1, 0, 1, 2), certificate=(1e-5, math.inf, 0.5, math.inf)),
    ):
        value = json.loads(json.dumps(record.to_json(), allow_nan=False))
        assert value == signed(value)
        assert Record.from_json(value) == Record.from_json(dict(reversed(value.items()))) == record


def test_a_changed_record_is_refused() -> None:
    good = record_of().to_json()
    unsigned, fewer = ({key: good[key] for key in good if key != name} for name in ("record_sha256", "figures"))
    for value in (
        good | {"lost": []}, unsigned, signed(fewer), signed(good | {"colour": 1}), signed(good | {"labels": 4}), [],
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"^not a record \(|^does not match its own checksum$"):
            Record.from_json(value)


def huge(path: Path) -> None:
    """An .npz file whose header announces 2^60 images."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (2**60, 4, 4, 1)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue())


def wide(path: Path) -> None:
    Image.new("L", (5000, 5000)).save(path, "png")


def bad(path: Path) -> None:
    path.write_bytes(b"x")


REPLACED: dict[str, tuple[str, str, Callable[[Path], None], str]] = {
    "a huge header": ("npz", "shards/00000.npz", huge, r"holds uint8 of shape \(1152921504606846976, 4, 4, 1\), not u"),
    "other numbers": ("npz", "shards/00000.npz", lambda p: np.savez(p, np.zeros((4, 4, 4, 1))), "holds float64 of sh"),
    "no array": ("npz", "shards/00000.npz", bad, "holds no images"),
    "a large picture": ("png", "images/0/00000000.png", wide, "holds an image 5000x5000 L, not 4x4 L"),
    "no picture": ("png", "images/0/00000000.png", bad, "holds no image"),
}  # fmt: skip


@pytest.mark.parametrize("name", REPLACED)
def test_images_of_another_shape_are_refused_by_their_header(name: str, tmp_path: Path) -> None:
    """Though all checksums are right."""
    kind, place, replace_it, words = REPLACED[name]
    folder = folder_of(tmp_path, files=kind)
    replace_it(tmp_path / place)
    paths = [tmp_path / place, *(tmp_path / f"images/{i % 3}/{i:08}.png" for i in (1, 2, 3) if kind == "png")]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
    record = tmp_path / "shards" / "00000.json"
    record.write_text(json.dumps(signed(read(record) | {"sha256": digest})))
    folder = folder.with_checksums()
    folder.save_manifest()
    for look in (folder.check, lambda: folder.images(0)):
        with pytest.raises(SampleFolderError, match=rf"{place}: {words}.*; sample into the folder again"):
            look()
    assert not folder.verify(0)


def test_labels_and_flow_are_those_of_the_manifest(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    other = replace(folder, manifest=replace(folder.manifest, labels_sha256=SHA))
    with pytest.raises(SampleFolderError, match=r"manifest\.json: its labels are not those of the shards; restore it"):
        other.check()
    for changed in ({"labels_sha256": None}, {"num_classes": 2}):
        with pytest.raises(SampleFolderError, match=r"00000\.json: its labels are not those of manifest\.json; sample"):
            replace(folder, manifest=replace(folder.manifest, **changed)).check()
    folder.check_flow(make_flow(image_size=4, num_classes=3))
    for given, words in (
        ({"image_size": 8}, r"images of shape \(1, 4, 4\), the model \(1, 8, 8\)"),
        ({"num_classes": 2}, "num_classes 3, the model 2"),
    ):  # fmt: skip
        with pytest.raises(SampleFolderError, match=f"has {words}; give the model of the samples"):
            folder.check_flow(make_flow(**{"image_size": 4, "num_classes": 3, **given}))
    jf.Strategy.uniform(jf.Solver(), 3).save(tmp_path / "strategy.json")
    digest = hashlib.sha256((tmp_path / "strategy.json").read_bytes()).hexdigest()
    with pytest.raises(SampleFolderError, match="has a strategy of blocks 3, the model 2"):
        replace(folder, manifest=replace(folder.manifest, strategy_sha256=digest)).check_flow(
            make_flow(image_size=4, num_classes=3)
        )


def test_all_problems_of_a_folder_are_found(tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder = folder_of(out)
    assert list(problems(out)) == []
    strategy = replace(folder, manifest=replace(folder.manifest, strategy_sha256=SHA))
    strategy.save_manifest()
    for name in ("mine.txt", "images/a.png", f"shards/.00001.npz.{16 * 'a'}.partial", "samples.png"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("x")
    flip(out / "shards" / "00000.npz")
    (out / "shards" / "00001.json").write_text("{}")
    (out / "shards" / "00002.json").unlink()
    before = everything(out)
    with locked(out):
        found = [line.removeprefix(f"{out}").lstrip("/").partition(";")[0] for line in problems(out)]
    assert found == [
        ": a run is writing to it", "strategy.json: has changed since its run wrote it",
        "shards/00000.npz: does not match its checksum", "shards/00001.json: damaged, or of other samples",
        "shards/00002.json: missing", f"shards/.00001.npz.{16 * 'a'}.partial: half-written by a run that was stopped",
        "mine.txt and 1 more: not of the run, which leaves them alone",
    ]  # fmt: skip
    assert everything(out) == before
    (out / "manifest.json").write_text("{}")
    (tmp_path / "loop").symlink_to("loop")
    for path, words in ((out, "not a manifest"), (tmp_path / "loop", "cannot be read"), (tmp_path, "no manifest")):
        (line,) = problems(path)
        assert words in line
