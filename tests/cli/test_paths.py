"""No output of a command is one of its inputs, or another output, and all can be written: before any work."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import jacobiflow as jf
from jacobiflow.cli import paths
from jacobiflow.flows.folder import MODELS
from jacobiflow.storage import sample_to_folder

LONG = "x" * 250  # a name for a file, but not for a half-written one
IN = "--model {w}/model"
SAMPLE = f"sample {IN} --num 2 --strategy {{w}}/s.json --labels {{w}}/l.txt --report {{w}}/r.json --out {{w}}/new"
EVALUATE = f"evaluate {IN} --samples {{w}}/drawn --images {{w}}/pets --stats {{w}}/st.pth --inception {{w}}/i.pth"
EVALUATE = f"{EVALUATE} --out {{w}}/new"
COMPARE = f"compare {IN} --strategy {{w}}/s.json --images {{w}}/pets --report {{w}}/r.json --out {{w}}/new"
CALIBRATE = f"calibrate {IN} --images {{w}}/pets"
PLAN = f"plan {IN} --report {{w}}/r.json"
TRACE = f"trace {IN} --report {{w}}/r.json --labels {{w}}/l.txt --out {{w}}/new"
BENCH = f"bench {IN} --strategy jacobi --strategy {{w}}/s.json --report {{w}}/r.json --out {{w}}/new"
TRAIN = "train --images {w}/pets --image-size 8 --steps 1 --out {w}/new"
CONVERT = "convert {w}/flow.pth --patch-size 2 --noise-std 0.1 --out {w}/new"
READ = "which this command reads"

# A command, the option of the output, and the path that it must not be; then a part of the message.
REFUSED = [
    *[(SAMPLE, "--json", path, READ) for path in (
        "model/config.json", "model/model.safetensors", "s.json", "l.txt", "r.json", "link.json", "hard.json",
        "drawn/../s.json",
    )],
    (SAMPLE, "--json", "model/report.json", READ),
    (SAMPLE, "--json", "new/shards/x.json", "is one of the files that this command writes into --out "),
    (SAMPLE, "--json", "new/.lock", "is one of the files that this command writes into --out "),
    (SAMPLE, "--json", "new", "is the folder --out, or above it"),
    (SAMPLE, "--json", "drawn", "is a folder; give a file"),
    (SAMPLE, "--json", "missing/f.json", "give a file in a folder that exists"),
    (SAMPLE, "--json", "s.json/f.json", "give a file in a folder that exists"),
    (SAMPLE, "--json", LONG, "cannot write there (File name too long)"),
    (SAMPLE, "--json", "loop", "cannot be used (Too many levels of symbolic links)"),
    (SAMPLE, "--out", "loop/new", "cannot be used (Too many levels of symbolic links)"),
    (SAMPLE, "--out", f"new/{LONG * 2}", "cannot write there (File name too long)"),
    (SAMPLE, "--out", "s.json", "cannot write there (Not a directory)"),
    (SAMPLE, "--model", "loop", "cannot be used (Too many levels of symbolic links)"),
    *[(EVALUATE, "--json", f"drawn/{name}", READ) for name in (
        "manifest.json", "strategy.json", "shards/00000.json", "shards/00000.npz"
    )],
    *[(EVALUATE, option, path, READ) for option in ("--json", "--save-stats") for path in (
        "pets/a/0.png", "linked.png", "st.pth", "i.pth", "hard.png"
    )],
    (EVALUATE, "--save-stats", "new/evaluation.json", "is one of the files that this command writes into --out "),
    (EVALUATE, "--save-stats", "drawn", "is a folder; give a file"),
    (EVALUATE, "--out", "pets/a", "is in --images "),
    (EVALUATE, "--out", "drawn/shards", "is in --samples "),
    (COMPARE, "--json", "new/rows/x.json", "is one of the files that this command writes into --out "),
    (COMPARE, "--json", "pets/a/0.png", READ),
    (COMPARE, "--json", "s.json", READ),
    *[(CALIBRATE, "--out", path, READ) for path in (
        "model/config.json", "model/model.safetensors", "pets/a/0.png", "hard.png"
    )],
    (f"{CALIBRATE} --out {{w}}/new.json", "--json", "model/report.json", READ),
    (f"{CALIBRATE} --out {{w}}/new.json", "--json", "new.json", "is --out too; give two files"),
    (f"{CALIBRATE} --out {{w}}/new.json", "--json", "new.json/f", "is below --out "),
    (CALIBRATE, "--out", "drawn", "is a folder; give a file"),
    (CALIBRATE, "--out", f"{MODELS}/digits-p1/report.json", "lies with the bundled models"),
    (CALIBRATE, "--out", "s.json/r.json", "cannot write there (Not a directory)"),
    *[(PLAN, "--out", path, READ) for path in ("model/config.json", "model/report.json", "r.json")],
    (f"{PLAN} --out {{w}}/new.json", "--json", "r.json", READ),
    *[(TRACE, "--json", path, READ) for path in ("r.json", "l.txt", "model/config.json")],
    (TRACE, "--json", "new/guesses.png", "is one of the files that this command writes into --out "),
    (TRACE, "--out", "foreign", "guesses.png: is not a picture that jacobiflow made; move it away"),
    (TRACE, "--out", "odd", "guesses.png: is a folder, where this command writes a file"),
    (TRACE, "--out", f"{MODELS}/digits-p1/trace", "lies with the bundled models"),
    *[(BENCH, "--json", path, READ) for path in ("s.json", "r.json", "model/model.safetensors")],
    (BENCH, "--json", "new/bench.json", "is one of the files that this command writes into --out "),
    *[(BENCH, "--html", path, READ) for path in ("s.json", "r.json", "model/model.safetensors")],
    (BENCH, "--html", "new/bench.json", "is one of the files that this command writes into --out "),
    (BENCH, "--html", "missing/p.html", "give a file in a folder that exists"),
    (BENCH, "--html", "foreign/guesses.png", "is not a page that jacobiflow wrote; move it away, or give another file"),
    (f"{COMPARE} --json {{w}}/p.html", "--html", "p.html", "is --json too; give two files"),
    (TRAIN, "--json", "pets/a/0.png", READ),
    (TRAIN, "--json", "new/samples-000500.png", "is one of the files that this command writes into --out "),
    (TRAIN, "--out", "pets/run", "is in --images "),
    (CONVERT, "--json", "flow.pth", "is FILE "),
    ("info --model {w}/model", "--json", "model/config.json", READ),
    ("doctor {w}/drawn", "--json", "drawn/shards/00000.npz", "is in PATH "),
]  # fmt: skip


@pytest.fixture(scope="module")
def place(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of everything that a command reads, and links to it."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(work / "model", folder / "model")
    for name, kept in (("s.json", "window.json"), ("r.json", "report.json"), ("model/report.json", "report.json")):
        shutil.copy(work / kept, folder / name)
    (folder / "l.txt").write_text("0 1")
    for name in ("st.pth", "i.pth", "flow.pth"):
        torch.save({}, folder / name)
    flow = jf.load(folder / "model")
    sample_to_folder(flow, 2, folder / "drawn", torch.tensor([0, 1]), strategy="jacobi-1", progress=False)
    for name in ("pets/a/0.png", "pets/b/1.png", "foreign/guesses.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(folder / name)
    (folder / "odd" / "guesses.png").mkdir(parents=True)
    (folder / "link.json").symlink_to("r.json")
    os.link(folder / "s.json", folder / "hard.json")
    os.link(folder / "pets/b/1.png", folder / "hard.png")
    Image.new("L", (8, 8)).save(folder / "linked.png")
    (folder / "pets/b/2.png").symlink_to(folder / "linked.png")
    (folder / "loop").symlink_to("loop")
    return folder


@pytest.mark.parametrize(("line", "option", "path", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_a_command_reads_or_writes_is_not_overwritten(
    line: str, option: str, path: str, message: str, place: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def content() -> dict[Path, Any]:
        return {path: path.read_bytes() if path.is_file() else None for path in place.rglob("*")}

    monkeypatch.setattr(jf.Latent, "__call__", None)  # no work begins
    before, folder = content(), len(os.listdir(str(MODELS)))
    result = run(f"{line.format(w=place)} {option} {place / path}")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ") and result.err.count("\n") == 1 and len(result.err) <= 308
    assert message in result.err
    assert (content(), len(os.listdir(str(MODELS)))) == (before, folder)


def test_a_report_may_go_beside_its_model(run: Any, place: Path) -> None:
    """Where `auto` finds it; again too."""
    line = f"calibrate --model {place}/model --images {place}/pets --segments 1 --traced 1"
    for name in ("report.json", "report-guided.json"):
        assert run(f"{line} --out {place}/model/{name}").code == 0
        assert jf.Report.load(place / "model" / name).settings.num_images == 3


def test_every_image_is_looked_at_once_for_all_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    for folder, number in ((images, 30), (out, 20)):
        folder.mkdir()
        for i in range(number):
            (folder / f"sheet-{i}.png").touch()
    seen, look = list[Path](), os.stat
    monkeypatch.setattr(os, "stat", lambda path, **options: (seen.append(path), look(path, **options))[1])
    paths.check(None, out, ("sheet-*.png",), images=str(images))
    assert sorted(path for path in map(Path, seen) if path.parent == images) == sorted(images.iterdir())
    (images / "link").symlink_to(out / "sheet-19.png")
    with pytest.raises(ValueError, match=r"sheet-19\.png: is in --images .*, which this command reads; give another"):
        paths.check(None, out, ("sheet-*.png",), images=str(images))
