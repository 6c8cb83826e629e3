"""`jacobiflow compare`: what it runs by default, writes and prints; the figures are tests/experiments' concern."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browsing import read_page
from PIL import Image
from problems import make_flow, to_float32
from running import figures
from scoring import difference, fashion_features, levels, on_disk, pixel_figures
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

import jacobiflow as jf
from jacobiflow.baselines import PEERS
from jacobiflow.cli import main
from jacobiflow.data import bundled_fashion
from jacobiflow.evaluation import Statistics, frechet_distance
from jacobiflow.locking import locked

pytest.importorskip("torchmetrics")

SIZES = "--num 8 --batch-size 4 --shard-size 4 --repeats 1"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a report; what is compared stays in `out`."""
    folder = tmp_path_factory.mktemp("work")
    flow = to_float32(make_flow(image_size=28, patch_size=7, num_classes=3))
    flow.save_pretrained(folder / "model")
    to_float32(make_flow()).save_pretrained(folder / "small")
    images = torch.randn(6, 1, 28, 28, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    report = jf.calibrate(flow, images, torch.arange(6) % 3, segments=4, traced=2, progress=False)
    metrics = {norm: replace(found, components=None) for norm, found in report.metrics.items()}
    replace(report, metrics=metrics, segment_traces={}).save(folder / "no-crm.json")
    (folder / "text").write_text("no statistics")
    data = bundled_fashion().images
    for i in range(30):
        (folder / "real").mkdir(exist_ok=True)
        Image.fromarray(data[i, 0].numpy()).save(folder / "real" / f"{i}.png")
    return folder


def stamps(out: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for kind in ("npz", "npy") for path in out.rglob(f"*.{kind}")}


def test_a_comparison_is_written_printed_and_resumed(run: Any, tmp_path: Path) -> None:
    line = f"compare --model model {SIZES} --strategy jacobi-2 --strategy auto:1e-2 --strategy auto --images real"
    result = run(f"{line} --out {tmp_path}/o --json {tmp_path}/f --final 14 --html {tmp_path}/p.html")
    assert result.code == 0
    shown = figures(tmp_path / "f")
    assert shown == figures(tmp_path / "o" / "comparison.json")
    assert [row["name"] for row in shown["rows"]] == ["Original", "sequential", "jacobi-2", "auto:1e-2", "auto"]
    assert (shown["model"], shown["distance"], shown["seed"], shown["denoise"]) == ("model", "fashion-FID", 0, 0)
    assert (shown["against"], shown["guidance"]) == ("the training split of real", None)
    close = [row for row in shown["rows"][2:] if row["relative"] <= 0.01]
    autos = [row for row in close if row["name"].startswith("auto")]
    plain = [row for row in close if not row["name"].startswith("auto")]
    best = [max(rows, key=lambda row: row["rate"])["name"] for rows in (plain, autos) if rows]
    assert [row["name"] for row in shown["final"]] == ["Original", *best]
    assert [row["num"] for row in shown["final"]] == [14] * len(shown["final"])
    with Image.open(tmp_path / "o" / "comparison.png") as picture:
        assert picture.width > picture.height > 300

    lines = result.out.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    assert lines[0] == "8 samples of each of 5 rows: about 0 minutes by one process"
    assert f"6 samples of each of {len(shown['final'])} rows: about 0 minutes by one process" in lines
    assert lines[-1] == f"wrote {tmp_path}/o/comparison.json and {tmp_path}/o/comparison.png"
    for row in shown["rows"]:
        (found, *_) = [line for line in lines if line.startswith(f"{row['name']} ")]
        for cell in (f"{row['distance']:.4f}", f"{100 * row['relative']:+.2f}%", f"{row['rms']:.1e}"):
            assert cell in found
        assert found.rstrip().endswith(f" {row['rate']:.2f}x")

    page = read_page(tmp_path / "p.html")
    assert page.figures == (tmp_path / "f").read_bytes()
    for table, rows in zip(page.tables, (shown["rows"], shown["final"]), strict=True):
        assert [(cells[0], cells[1]) for cells in table] == [(row["name"], f"{row['distance']:.4f}") for row in rows]
    assert len(page.images) == 2

    before = stamps(tmp_path / "o")  # a shorter run is had from a longer one
    assert run(f"{line} --out {tmp_path}/o --json {tmp_path}/f").code == 0
    assert stamps(tmp_path / "o") == before
    again = figures(tmp_path / "f")
    assert (again["final"], again["timings"], again["rows"][2]) == (None, shown["timings"], shown["rows"][2])
    refused = run(f"{line} --out {tmp_path}/o --seed 5")
    assert (refused.code, refused.out) == (2, "")
    assert re.fullmatch(r"error: \S+: holds samples of seed 0, not 5; give another folder, or [^\n]+\n", refused.err)
    assert run(f"{line} --out {tmp_path}/o --seed 5 --overwrite").code == 0
    assert figures(tmp_path / "o" / "comparison.json")["seed"] == 5


def test_default_rows_of_a_report_without_crm(run: Any, tmp_path: Path) -> None:
    line = f"compare --model model --num 2 --batch-size 2 --repeats 1 --out {tmp_path}"
    assert run(f"{line} --report no-crm.json").code == 0
    rows = figures(tmp_path / "comparison.json")["rows"]
    plain, autos = ["Jacobi-30", "Jacobi-60"], ["auto:1e-1", "auto:1e-2", "auto"]
    assert [row["name"] for row in rows] == ["Original", "sequential", *plain, *PEERS, *autos]


def test_a_row_of_the_bundled_model(run: Any, tmp_path: Path) -> None:
    """With the guesses of its report, which is in its folder."""
    line = "compare --model fashion-p2 --num 2 --batch-size 2 --repeats 1 --strategy [7-4-6-10]"
    assert run(f"{line} --out {tmp_path}").code == 0
    flow = jf.load("fashion-p2")
    plan = jf.Strategy.parse("[7-4-6-10]", jf.Report.load(jf.find_report(flow)))  # type: ignore[arg-type]
    want = jf.sample(flow, 2, torch.arange(2), strategy=plan, certify=False, progress=False)
    pixels, original = (on_disk(tmp_path / "rows" / name) for name in ("7-4-6-10", "sequential"))
    assert np.array_equal(pixels, levels(want.images))
    row = figures(tmp_path / "comparison.json")["rows"][2]
    real, drawn = Statistics.bundled("fashion"), Statistics.of(torch.from_numpy(fashion_features(pixels)))
    assert row["distance"] == pytest.approx(frechet_distance(real, drawn), rel=1e-6)
    exact = torch.from_numpy(np.load(tmp_path / "exact" / "00000000.npy"))
    assert np.array_equal(original, levels(exact))
    assert (row["max"], row["rms"]) == pytest.approx(difference(want.images, exact), rel=1e-6)
    assert row["pixels"] == pixel_figures(pixels, original)


def test_the_estimate_counts_images_that_rows_share_once(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch takes a minute by the sequential loop, and half a minute to denoise."""
    seconds = {"Original": 5000.0, "sequential": 60.0}
    rows = {name: {"median": s, "min": s, "max": s, "error": 0.0} for name, s in seconds.items()}
    timed = {"batch_size": 4, "denoise_seconds": 30.0, "rows": rows}
    monkeypatch.setattr("jacobiflow.cli.compare.timings", lambda *_: timed)
    line = f"compare --model model --num 8 --final 28 --batch-size 4 --strategy sequential --out {tmp_path}"
    found = re.findall(r"(\d+) samples of each of (\d) rows: about (\d+) minutes", run(line).out)
    assert found == [("8", "2", "3"), ("20", "1", "8")]  # two batches of 1.5 minutes, and five more


def launched(out: str, *arguments: str) -> None:
    with open(out + os.environ["RANK"], "w") as sys.stdout:
        main(list(arguments))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_two_processes_give_the_samples_of_one(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torchrun, whose processes are forks of this one: most of their time would go to imports."""
    line = f"compare --model model {SIZES} --strategy jacobi-2 --final 12"
    assert run(f"{line} --out {tmp_path}/one").code == 0
    meeting = "--rdzv-backend c10d --rdzv-endpoint localhost:0 --nproc-per-node 2"
    torchrun = f"{meeting} -m -- jacobiflow {line} --out {tmp_path}/two"
    config, _, arguments = config_from_args(parse_args(torchrun.split()))
    assert arguments[:3] == ["-u", "-m", "jacobiflow"]
    config.start_method = "fork"
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGUSR1")  # and none of this process's own
    elastic_launch(config, launched)(f"{tmp_path}/printed", *arguments[3:])
    assert [(tmp_path / f"printed{i}").read_text().count("samples a row") for i in range(2)] == [2, 0]
    for name in ("jacobi-2", "sequential"):  # which of them goes on to 12 is a matter of timings
        one, two = (on_disk(tmp_path / run / "rows" / name)[:8].astype(int) for run in ("one", "two"))
        assert np.abs(one - two).max() <= 1
    rows = (figures(tmp_path / out / "comparison.json")["rows"][2] for out in ("one", "two"))
    one, two = ({key: row[key] for key in ("num", "distance", "max")} for row in rows)
    assert one == pytest.approx(two, rel=1e-2)


@pytest.mark.parametrize("options", ["", "--overwrite"])
@pytest.mark.parametrize("name", ["comparison.png", "comparison.json", "settings.json"])
def test_files_of_others_are_refused(name: str, options: str, refuse: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"model": "m"}')
    refuse(f"{COMPARED} --images real --out {tmp_path} {options}", f"{name}: is not a ")


def test_one_comparison_at_a_time(refuse: Any, tmp_path: Path) -> None:
    with locked(tmp_path / "out"):
        refuse(f"{COMPARED} --images real --out {tmp_path}/out", "another run is writing to it; wait for it")


COMPARED = f"compare --model model {SIZES} --strategy jacobi-2"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{COMPARED} --num 0", "--num 0: give a positive number"), (f"{COMPARED} --num 1", "--num 1: give at least 2"),
        (f"{COMPARED} --shard-size 6", "--shard-size 6: give a multiple of --batch-size, 4"),
        (f"{COMPARED} --shard-size 0", "--shard-size 0: give a positive number"),
        (f"{COMPARED} --final 7", "--final 7: give at least --num, 8"),
        (f"{COMPARED} --features none", "--features none: give one of fashion, emoji, inception"),
        (f"{COMPARED} --strategy Jacobi-2", "given twice; give each row once"),
        (f"{COMPARED} --strategy auto:x", "'auto:x': give auto, or auto:TOLERANCE such as auto:1e-2"),
        (f"{COMPARED} --stats text", "text: no file of tensors"), (f"{COMPARED} --labels 99", "label 99: this flow"),
        ("compare --model small --num 8 --strategy jacobi-2", "this model's are 1x8x8; give inception"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(line: str, message: str, refuse: Any) -> None:
    refuse(f"{line} --out out-x", message)
