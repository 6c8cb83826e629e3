"""`jacobiflow sample`: resuming, comparing, labels from files, and what it refuses; tests/storage has the rest."""

from __future__ import annotations

import importlib
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import make_flow, to_float32
from running import figures, run_line
from sample_folders import eight_bit, everything, read

import jacobiflow as jf
from jacobiflow.storage import FirstProcessFailed

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "small"
    to_float32(make_flow(num_classes=3)).save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", "80")
    return partial(run_line, capsys=capsys)


def test_the_same_command_again_has_nothing_to_draw(run: Any, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = f"sample --model {model} --num 10 --strategy jacobi-3 --batch-size 2 --shard-size 4 --out {out}"
    first = run(f"{line} --json {tmp_path}/1.json")
    before = (out / "shards" / "00001.npz").read_bytes()
    assert (first.code, first.err) == (0, "")
    assert re.search(r"drew 10 in \d+ s by 1 process: [\d.]+ images a second; 0\.00% of all were solved", first.out)
    assert f"wrote {out}: 3 shards, manifest.json, strategy.json, samples.png\n" in first.out
    again = run(f"{line} --json {tmp_path}/2.json")
    assert (again.code, again.err) == (0, "")
    assert f"all 10 were in {out} already, and match their checksums; --overwrite draws them anew\n" in again.out
    one, two = figures(tmp_path / "1.json"), figures(tmp_path / "2.json")
    assert one["runs"] == two["runs"]
    assert (one["drawn"], two["drawn"], one["shards"], one["processes"]) == (10, 0, 3, 1)
    calls = [read(out / "shards" / f"0000{i}.json")["figures"]["network_calls"] for i in range(3)]
    assert one["runs"]["jacobi-3"]["network_calls"] == sum(calls)
    (out / "shards" / "00001.npz").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        resumed = run(line)
    assert resumed.code == 0
    assert re.fullmatch(r"warning: .* 00001 for one; drawn again\n.*: resumed, 1 of 3 shards to draw\n", resumed.err)
    assert (out / "shards" / "00001.npz").read_bytes() == before


REFUSED = {
    "--num 0": "'--num'",
    "--files bmp": "--files bmp: give npz or png",
    "--batch-size 2 --shard-size 3": "--shard-size 3: give a multiple of the batch size, 2",
    "--compare": "holds samples already; give --overwrite to draw them anew, or another folder as --out",
    "--seed 4": "holds samples of seed 0, not 4; give another folder, or --overwrite to replace them",
    "--num 1 --batch-size 2": "holds a run of 2 samples, more than 1; give --num 2; or give another folder",
    "--overwrite --labels 7": "label 7: this flow has classes 0 to 2",
    "--strategy s.json --report r.json": "--report r.json: the strategy in s.json has its own guesses",
    "--json {out}/manifest.json": "manifest.json: is one of the samples' own files; give another",
    "--json {out}/images/x.json": "x.json: is one of the samples' own files; give another",
    "--json {out}/samples.png": "samples.png: is one of the samples' own files; give another",
}


@pytest.mark.parametrize("options", REFUSED)
def test_a_line_that_is_refused_loses_nothing(options: str, run: Any, model: Path, tmp_path: Path) -> None:
    line = f"sample --model {model} --num 2 --strategy jacobi-1 --out {tmp_path}/out"
    assert run(line).code == 0
    before = everything(tmp_path)
    result = run(f"{line} {options.format(out=tmp_path / 'out')}")
    assert (result.code, result.out) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", result.err)
    assert REFUSED[options] in result.err
    assert everything(tmp_path) == before


def test_other_processes_than_the_first_are_silent_where_it_failed(
    run: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(*_: Any, **__: Any) -> None:
        raise FirstProcessFailed("no room")

    monkeypatch.setattr(importlib.import_module("jacobiflow.cli.sample"), "sample_to_folder", failed)
    result = run(f"sample --model {model} --num 2 --out {tmp_path}/out")
    assert (result.code, result.out, result.err) == (2, "", "")


def test_comparing_draws_both_in_the_same_batches(run: Any, model: Path, tmp_path: Path) -> None:
    line = f"sample --model {model} --num 70 --strategy window:16 --labels 1 --compare --out {tmp_path}"
    assert run(f"{line} --json {tmp_path}/f").code == 0
    shown, labels = figures(tmp_path / "f"), torch.ones(70, dtype=torch.int64)
    want = jf.sample(jf.load(str(model)), 70, labels, strategy="sequential", batch_size=64, progress=False)
    assert shown["batch_size"] == 64
    assert shown["runs"]["sequential"]["network_calls"] == want.network_calls


LABELS: dict[str, tuple[Any, str]] = {
    "missing.npy": (None, "cannot be read as whole numbers (No such file or directory)"),
    "empty.txt": (b"", "cannot be read as whole numbers"),
    "floats.txt": (b"0 1.0 2 0", "cannot be read as whole numbers"),
    "three.txt": (b"0 1 2", "int64 of shape (3,); give 4 whole numbers, one per image"),
    "marks.npy": (np.zeros(4, bool), "bool of shape (4,); give 4 whole numbers"),
    "objects.npy": (np.array([0, 1, 2, None]), "cannot be read as whole numbers"),
    "huge.npy": (np.full(4, 2**64 - 1, np.uint64), "label"),
    "beyond.txt": (b"0 1 2 3", "label 3: this flow has classes 0 to 2"),
}


@pytest.mark.parametrize("name", LABELS)
def test_a_bad_file_of_labels_is_one_line(name: str, run: Any, model: Path, tmp_path: Path) -> None:
    path, (content, words) = tmp_path / name, LABELS[name]
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content, allow_pickle=True)
    result = run(f"sample --model {model} --num 4 --strategy jacobi-1 --labels {path} --out {tmp_path}/out")
    assert (result.code, result.out) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", result.err)
    assert words in result.err
    assert not (tmp_path / "out").exists()


def test_labels_from_files(run: Any, model: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("2\n0\n-1\n1\n")
    (tmp_path / "commas.txt").write_text("  2, 0,-1 , 1")
    np.save(tmp_path / "big-endian.npy", np.array([2, 0, -1, 1], ">i4"))
    want = jf.sample(jf.load(str(model)), 4, torch.tensor([2, 0, -1, 1]), strategy="jacobi-1", progress=False)
    for name in ("lines.txt", "commas.txt", "big-endian.npy"):
        line = f"sample --model {model} --num 4 --strategy jacobi-1 --labels {tmp_path / name}"
        result = run(f"{line} --out {tmp_path}/{name}-out")
        assert (result.code, result.err) == (0, "")
        with np.load(tmp_path / f"{name}-out" / "shards" / "00000.npz") as arrays:
            assert arrays["labels"].tolist() == [2, 0, -1, 1]
            assert np.array_equal(arrays["arr_0"], eight_bit(want.images))
