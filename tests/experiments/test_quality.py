"""Comparisons of quality: every figure once more from the images on disk, resuming, and what is refused."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from problems import make_flow, make_identity, to_float32
from running import figures
from sample_folders import everything
from scoring import difference, frechet, levels, moments, on_disk, pixel_figures
from torch import Tensor, nn

import jacobiflow as jf
from jacobiflow.baselines import GRIDS, PEERS, SEQUENTIAL
from jacobiflow.denoising import denoise
from jacobiflow.evaluation import PixelDifference, Statistics
from jacobiflow.experiments.quality import (
    ORIGINAL,
    Experiment,
    Row,
    begin,
    draw,
    finalists,
    largest_row,
    problems,
    score,
    timings,
)
from jacobiflow.latents import draw_latents
from jacobiflow.locking import locked
from jacobiflow.measuring import Timing
from jacobiflow.strategy import Prediction

pytest.importorskip("torchmetrics")

pytestmark = pytest.mark.usefixtures("one_thread")

NUM = 20
GUIDANCE = jf.Guidance(0.6, annealed=False, on="shift", attn_temperature=0.9)
NAMES = (ORIGINAL, SEQUENTIAL, "jacobi-2", "auto:1e-2", "STARFlow", "Selective Jacobi Decoding", "[1-4-2-3]")
FLOW = to_float32(make_flow(num_classes=3, noise_std=0.1))


class Projection(nn.Module):
    """Eight features of 8x8 images: fixed sums of their pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) / 100)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).float() @ self.weight


REAL = torch.randint(256, (50, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def features(pixels: Any) -> Any:
    return pixels.reshape(len(pixels), 64).astype(np.float64) @ Projection().weight.detach().double().numpy()


def experiment(out: Path, names: tuple[str, ...] = NAMES, **settings: Any) -> Experiment:
    settings = {"labels": torch.arange(NUM) % 3, "batch_size": 4, "shard_size": 8, **settings}
    return Experiment(settings.pop("flow", FLOW), out, names, **settings)


def scored(found: Experiment, num: int = NUM) -> list[Row]:
    folders = {name: draw(found, name, num, progress=False) for name in found.names}
    return score(folders, num, Projection(), Statistics.of(Projection()(REAL).detach()), timings(found, 1))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A comparison, guided and denoised."""
    found = experiment(tmp_path_factory.mktemp("work") / "out", guidance=GUIDANCE, denoise=0.8)
    begin(found)
    return SimpleNamespace(of=found, out=found.out, timings=timings(found, 1), rows=scored(found))


@pytest.fixture
def copied(compared: SimpleNamespace, tmp_path: Path) -> Experiment:
    """A copy of the folder `compared`, to resume."""
    return replace(compared.of, out=Path(shutil.copytree(compared.out, tmp_path / "copied")))


def draw_row(of: Experiment, name: str, num: int = NUM, rate: float = 0.8) -> tuple[Tensor, float]:
    """The images of a row of `compared`, drawn by the library's samplers, and the share that was solved again."""
    auto = replace(jf.Strategy.load(of.out / "plans" / "auto-1e-2.json"), prediction=None)
    strategy = {ORIGINAL: SEQUENTIAL, "auto:1e-2": auto}.get(name, name)
    images, resolved = [], 0
    size = 8 if strategy is auto else 4  # samples of a shard take turns in its batches, in fronts of their own
    for start in range(0, num, size):
        count = min(size, num - start)
        z, labels = draw_latents(count, 16, 4, 0, start), torch.arange(start, start + count) % 3
        if name in PEERS:
            found = PEERS[name](FLOW, z, labels, GUIDANCE, **GRIDS[name][0]).images
            images.append(denoise(FLOW, found, labels, rate) if rate else found)
            continue
        drawn = jf.sample(
            FLOW, latents=z, labels=labels, strategy=strategy, guidance=GUIDANCE, denoise=rate,
            certify=strategy is auto, batch_size=4, progress=False,
        )  # fmt: skip
        images.append(drawn.images)
        resolved += drawn.resolved_sequentially
    return torch.cat(images), resolved / num


def test_rows_are_what_their_samples_say(compared: SimpleNamespace) -> None:
    assert [row.name for row in compared.rows] == list(NAMES)
    exact, _ = draw_row(compared.of, ORIGINAL)
    original = on_disk(compared.of.row_folder(SEQUENTIAL))
    real = moments(features(REAL.numpy()))
    base = frechet(real, moments(features(original)))
    for row in compared.rows:
        images, resolved = draw_row(compared.of, row.name)
        pixels = on_disk(compared.of.row_folder(SEQUENTIAL if row.name == ORIGINAL else row.name))
        assert np.array_equal(pixels, levels(images))
        distance = frechet(real, moments(features(pixels)))
        assert (row.num, row.resolved) == (NUM, resolved)
        assert row.distance == pytest.approx(distance, rel=1e-5)
        assert row.relative == pytest.approx(distance / base - 1, abs=1e-5)
        assert (row.max, row.rms) == pytest.approx(difference(images, exact), rel=1e-6)
        assert asdict(row.pixels) == pixel_figures(pixels, original)
        seconds = compared.timings["rows"][row.name]
        extra = compared.timings["denoise_seconds"]
        assert asdict(row.seconds) == {key: seconds[key] + extra for key in ("median", "min", "max")}
        assert row.rate == (compared.timings["rows"][ORIGINAL]["median"] + extra) / (seconds["median"] + extra)
    assert (compared.rows[0].relative, compared.rows[0].max, compared.rows[1].max) == (0, 0, 0)
    assert compared.rows[2].max > 0.1
    kept = [np.load(path) for path in sorted((compared.out / "exact").iterdir())]
    assert np.array_equal(np.concatenate(kept), exact.numpy())
    manifest = figures(compared.of.row_folder("STARFlow") / "manifest.json")
    assert (manifest["guidance"], manifest["denoise"], manifest["certify"]) == (asdict(GUIDANCE), 0.8, False)
    assert figures(compared.of.row_folder("auto:1e-2") / "manifest.json")["certify"]


def test_timings_are_of_the_first_batch(compared: SimpleNamespace) -> None:
    assert set(compared.timings["rows"]) == set(NAMES)
    assert (compared.timings["batch_size"], compared.timings["repeats"]) == (4, 1)
    assert compared.timings["denoise_seconds"] > 0
    assert figures(compared.out / "timings.json") == compared.timings
    exact, _ = draw_row(compared.of, ORIGINAL, 4, rate=0)
    for name, found in compared.timings["rows"].items():
        assert found["min"] == found["median"] == found["max"] > 0
        want = difference(draw_row(compared.of, name, 4, rate=0)[0], exact)[0]
        # The loop of the original code differs by rounding.
        assert found["error"] == pytest.approx(want, rel=1e-4) if name != ORIGINAL else 0 < found["error"] < 1e-4


def test_a_network_in_bfloat16_keeps_the_state_of_a_peer_in_float32(tmp_path: Path) -> None:
    """Of the identity: what is left is the rounding of the state."""
    flow = make_identity(torch.bfloat16)
    flow.var.fill_(0.25)
    found = experiment(tmp_path, (ORIGINAL, *PEERS), flow=flow, labels=None)
    begin(found)
    assert [row["error"] for row in timings(found, 1)["rows"].values()] == [0] * 4
    assert [row.max for row in scored(found, 8)] == [0] * 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_overflows_is_infinitely_far(value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overflows(flow: Any, z: Tensor, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(images=flow.to_images(z).index_fill(0, torch.tensor([1]), value))

    monkeypatch.setitem(PEERS, "STARFlow", overflows)  # type: ignore[arg-type]
    found = experiment(tmp_path, (ORIGINAL, "STARFlow"))
    begin(found)
    for _ in range(2):  # the second time from the records
        row = scored(found, 8)[1]
        assert (row.max, row.rms) == (math.inf, math.inf)


def test_rows_and_samples_are_added(copied: Experiment) -> None:
    more = replace(copied, names=(*NAMES, "window:3"), labels=torch.arange(28) % 3)
    begin(more)
    assert timings(more, 1)["rows"].keys() == {*NAMES, "window:3"}
    for name in (SEQUENTIAL, "STARFlow"):
        pixels = on_disk(copied.row_folder(name))
        assert np.array_equal(on_disk(draw(more, name, 28, progress=False).path)[:NUM], pixels)
    assert largest_row(copied.out) == 28
    assert draw(more, "STARFlow", NUM, progress=False).manifest.num == 28  # what was begun for more stays
    with pytest.raises(ValueError, match="sequential: is of 28 samples, labels are given for 20; give them all"):
        begin(copied)


def test_lost_exact_images_are_drawn_again(compared: SimpleNamespace, copied: Experiment) -> None:
    path = copied.out / "exact" / "00000008.npy"
    want = path.read_bytes()
    for damage in (path.unlink, lambda: np.save(path, np.load(path)[:5]), lambda: path.write_bytes(want[:100])):
        damage()
        (copied.row_folder("STARFlow") / "shards" / "00001.json").unlink()
        assert scored(copied)[4] == compared.rows[4]
        assert path.read_bytes() == want


def test_timings_are_of_this_machine_and_these_rows(copied: Experiment) -> None:
    """Made anew otherwise; drawing may resume with other threads."""
    text = (copied.out / "timings.json").read_text()
    for entry in ("processor", "threads", "repeats", "strategy_sha256"):
        kept = json.loads(text)
        row = kept["rows"]["jacobi-2"]
        row["median"] = 1234.5
        (row if entry in row else kept if entry in kept else kept["machine"])[entry] = "another"
        (copied.out / "timings.json").write_text(json.dumps(kept))
        assert (timings(copied, 1) == kept) == (entry == "threads")
    (copied.out / "timings.json").unlink()
    assert timings(copied, 1)["rows"]["jacobi-2"]["median"] < 1234.5


def test_auto_keeps_its_plan(copied: Experiment) -> None:
    plan = jf.Strategy.uniform(jf.Solver(jf.Window(5), stopping=jf.Tolerance(1e-2)), 2)
    plan.save(copied.out / "plans" / "auto-1e-2.json")
    begin(copied)
    assert copied.strategy("auto:1e-2") == plan
    with pytest.raises(ValueError, match=r"holds samples of .*strategy"):
        draw(copied, "auto:1e-2", NUM, progress=False)


def test_another_experiments_folder_is_refused(copied: Experiment) -> None:
    before = everything(copied.out)
    changes: dict[str, dict[str, Any]] = {
        "seed 0, not 5": {"seed": 5}, "guidance {'weight': 0.6": {"guidance": None},
        "denoise 0.8, not 1.0": {"denoise": 1.0}, "shard_size 8, not 4": {"shard_size": 4},
        "batch_size 4, not 2": {"batch_size": 2}, "other labels": {"labels": torch.arange(NUM) // 7},
        "dtype float32": {"flow": make_flow(num_classes=3, noise_std=0.1)},
        "fingerprint": {"flow": to_float32(make_flow(num_classes=3, noise_std=0.1, seed=1))},
    }  # fmt: skip
    for words, change in changes.items():
        with pytest.raises(ValueError) as error:
            begin(replace(copied, **change))
        assert f"holds samples of {words}" in str(error.value)
        assert str(error.value).endswith("; give another folder, or overwrite=True to replace them")
    assert everything(copied.out) == before


def test_only_files_of_an_experiment_are_removed(copied: Experiment) -> None:
    out, foreign = copied.out, {
        "notes.txt", "rows/jacobi-2/notes.txt", "exact/mine.npy", "plans/mine.json", "plans/auto-mine.json",
        "plans/auto-1.json", "rows/mine/notes.txt",
    }  # fmt: skip
    (out / "rows" / "mine").mkdir()
    for name in foreign:
        (out / name).write_text("mine")
    begin(replace(copied, seed=5), overwrite=True)
    assert everything(out).keys() == {*foreign, "settings.json", "plans/auto-1e-2.json"}
    assert largest_row(out) == 0


def test_lost_settings_are_named(copied: Experiment) -> None:
    (copied.out / "settings.json").unlink()
    before = everything(copied.out)
    with pytest.raises(ValueError, match=r"holds rows, but settings\.json is lost; restore it, or .* overwrite=True"):
        begin(copied)
    assert everything(copied.out) == before
    begin(copied, overwrite=True)
    begin(copied)


FOREIGN = {
    "settings.json": '{"theme": "dark"}', "timings.json": "{", "comparison.json": "[]", "plans/auto-1e-2.json": "{}",
    "exact/00000008.npy": "mine", "rows/jacobi-2/manifest.json": '{"name": "app"}',
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_others_are_left_alone(name: str, copied: Experiment, tmp_path: Path) -> None:
    for out in (tmp_path / "new", copied.out):
        if name.startswith("exact") and out == copied.out:
            continue  # a damaged file of ours, which is drawn again
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(FOREIGN[name])
        before = everything(out)
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=re.escape(name)):
                begin(replace(copied, out=out), overwrite)
            assert everything(out) == before


def test_all_problems_of_a_comparison_are_found(copied: Experiment) -> None:
    out, mine = copied.out, "mine"
    assert list(problems(out)) == []
    for name in ("timings.json", "plans/auto-1e-2.json", "exact/00000008.npy", "notes.txt"):
        (out / name).write_text(mine)
    (out / "exact" / f".00000000.npy.{16 * 'a'}.partial").write_text(mine)
    (out / "rows" / "jacobi-2" / "shards" / "00001.json").unlink()
    shutil.copytree(out / "rows" / "jacobi-2", out / "rows" / "window-9")
    settings = figures(out / "settings.json")
    (out / "settings.json").write_text(json.dumps(settings | {"seed": 5}))
    before = everything(out)
    with locked(out):
        found = list(problems(out))
    assert everything(out) == before
    for words in (
        f"{out}: a run is writing to it", "timings.json: is not a file that jacobiflow wrote", "auto-1e-2.json: ",
        "00000008.npy: holds no images", "jacobi-2/shards/00001.json: missing", "notes.txt: not of the run",
        "window-9: holds samples of jacobi-2, not of a row of this name", ".partial: half-written",
        "starflow: holds samples of another seed",
    ):  # fmt: skip
        assert any(words in line for line in found), words
    assert "no settings.json in it" in next(problems(out / "plans"))


UNFIT: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "row 'jacobi-2': given twice": (("jacobi-2", "Jacobi-2"), {}), "'quickest': unknown": (("quickest",), {}),
    "Stack names block 9": (("[9-1-1-1]",), {}), "planned for device an abacus": (("planned.json",), {}),
    "label 3": ((), {"labels": torch.tensor([3])}), "denoise=-1.0": ((), {"denoise": -1.0}),
    "'auto:x': give auto, or auto:TOLERANCE": (("auto:x",), {}), "tolerance=nan": (("auto", "auto:nan"), {}),
}  # fmt: skip


@pytest.mark.parametrize("words", UNFIT)
def test_what_does_not_fit_is_refused_at_the_start(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    planned = Prediction("an abacus", 4, None, 1.0, 2.0, 0.0, 0.0)
    replace(jf.Strategy.uniform(jf.Solver(stopping=jf.MaxSweeps(4)), 2), prediction=planned).save("planned.json")
    names, settings = UNFIT[words]
    with pytest.raises(ValueError, match=words):
        begin(experiment(Path("out"), names, **settings))
    assert not Path("out").exists()


def test_finalists() -> None:
    def row(name: str, relative: float, rate: float) -> Row:
        pixels, seconds = PixelDifference(0.1, 3), Timing(1, 1, 1)
        return Row(name, 10, 5 * (1 + relative), relative, 0.1, 0.01, pixels, 0.0, seconds, rate)

    original = row(ORIGINAL, 0.0, 1.0)
    for rows, want in (
        ([("a", 0.0, 2), ("b", 0.005, 3), ("auto", 0.0, 4), ("auto:1e-1", 0.009, 5)], ["b", "auto:1e-1"]),
        ([("a", 0.02, 9), ("b", -0.3, 3), ("auto", 0.02, 9), ("auto:1e-1", 0.0, 1)], ["b", "auto:1e-1"]),
        ([("a", 0.01, 2), ("b", 0.01 + 1e-9, 3)], ["a"]), ([("a", 0.5, 2), ("auto", 0.0, 0.5)], ["auto"]),
        ([(SEQUENTIAL, 0.0, 9), ("a", 0.0, 2)], ["a"]), ([("a", math.nan, 9), ("auto", math.inf, 9)], []),
        ([("automatic.json", 0.0, 9), ("a", 0.0, 2)], ["automatic.json"]),
    ):  # fmt: skip
        made = [original, *(row(*figures) for figures in rows)]
        assert finalists(made) == finalists(made[::-1]) == [ORIGINAL, *want]
