"""Comparisons of quality: every figure once more from the images on disk, resuming, and what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from problems import make_flow, make_identity, to_float32
from running import figures
from scoring import difference, frechet, levels, moments, on_disk, pixel_figures
from torch import Tensor, nn

import jacobiflow as jf
from jacobiflow.baselines import GRIDS, PEERS, SEQUENTIAL
from jacobiflow.denoising import denoise
from jacobiflow.evaluation import PixelDifference, Statistics
from jacobiflow.experiments.quality import (
    ORIGINAL,
    WITHIN,
    Experiment,
    Row,
    begin,
    draw,
    finalists,
    largest_row,
    score,
    timings,
)
from jacobiflow.latents import draw_latents
from jacobiflow.measuring import Timing
from jacobiflow.strategy import Prediction

pytest.importorskip("torchmetrics")

pytestmark = pytest.mark.usefixtures("one_thread")

NUM = 20
GUIDANCE = jf.Guidance(0.6, annealed=False, on="shift", attn_temperature=0.9)
NAMES = (ORIGINAL, SEQUENTIAL, "jacobi-2", "auto:1e-2", "STARFlow", "Selective Jacobi Decoding", "[1-4-2-3]")
FLOW = to_float32(make_flow(num_classes=3, noise_std=0.1))
silent = partial(draw, progress=False)


class Projection(nn.Module):
    """Eight features of 8x8 images: fixed sums of their pixels."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) / 100
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).float() @ self.weight


REAL = torch.randint(256, (50, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def features(pixels: Any) -> Any:
    return pixels.reshape(len(pixels), 64).astype(np.float64) @ Projection().weight.double().numpy()


def experiment(out: Path, names: tuple[str, ...] = NAMES, **settings: Any) -> Experiment:
    settings = {"labels": torch.arange(NUM) % 3, "batch_size": 4, "shard_size": 8, **settings}
    return Experiment(settings.pop("flow", FLOW), out, names, **settings)


def scored(found: Experiment, num: int = NUM, timing: dict[str, Any] | None = None) -> list[Row]:
    folders = {name: silent(found, name, num) for name in found.names}
    timing = timings(found, 1) if timing is None else timing
    return score(folders, num, Projection(), Statistics.of(Projection()(REAL)), timing)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A comparison, guided and denoised."""
    found = experiment(tmp_path_factory.mktemp("work") / "out", guidance=GUIDANCE, denoise=0.8)
    begin(found)
    timed = timings(found, 1)
    return SimpleNamespace(of=found, out=found.out, timings=timed, rows=scored(found))


@pytest.fixture
def copied(compared: SimpleNamespace, tmp_path: Path) -> Experiment:
    """A copy of the folder `compared`, to resume."""
    return replace(compared.of, out=Path(shutil.copytree(compared.out, tmp_path / "copied")))


def draw_row(of: Experiment, name: str, num: int = NUM, rate: float = 0.8) -> tuple[Tensor, float]:
    """The images of a row of `compared`, drawn by the library's samplers, and the share that was solved again."""
    plan = replace(jf.Strategy.load(of.out / "plans" / "auto-1e-2.json"), prediction=None)
    images, resolved, auto = [], 0, name.startswith("auto")
    size = 8 if auto else 4  # samples of a shard take turns in its batches, where they have fronts of their own
    for start in range(0, num, size):
        count = min(size, num - start)
        z, labels = draw_latents(count, 16, 4, 0, start), torch.arange(start, start + count) % 3
        if name in PEERS:
            found = PEERS[name](FLOW, z, labels, GUIDANCE, **GRIDS[name][0]).images
            images.append(denoise(FLOW, found, labels, rate) if rate else found)
            continue
        drawn = jf.sample(
            FLOW, latents=z, labels=labels, strategy=plan if auto else SEQUENTIAL if name == ORIGINAL else name,
            guidance=GUIDANCE, denoise=rate, certify=auto, batch_size=4, progress=False,
        )  # fmt: skip
        images.append(drawn.images)
        resolved += drawn.resolved_sequentially
    return torch.cat(images), resolved / num


def folder_of(found: Experiment, name: str) -> Path:
    return found.row_folder(SEQUENTIAL if name == ORIGINAL else name)


def contents(out: Path, pattern: str = "*") -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob(pattern) if path.is_file()}


def stamps(out: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in (*out.rglob("*.np[yz]"), out / "timings.json")}


# ------------------------------------------------------------------------------------------------------------- figures


def test_rows_are_what_their_samples_say(compared: SimpleNamespace) -> None:
    assert [row.name for row in compared.rows] == list(NAMES)
    exact, _ = draw_row(compared.of, ORIGINAL)
    original = on_disk(folder_of(compared.of, ORIGINAL))
    real = moments(features(REAL.numpy()))
    base = frechet(real, moments(features(original)))
    for row in compared.rows:
        images, resolved = draw_row(compared.of, row.name)
        pixels = on_disk(folder_of(compared.of, row.name))
        assert np.array_equal(pixels, levels(images))
        distance = frechet(real, moments(features(pixels)))
        assert (row.num, row.resolved) == (NUM, resolved)
        assert row.distance == pytest.approx(distance, rel=1e-5)
        assert row.relative == pytest.approx(distance / base - 1, abs=1e-5)
        assert (row.max, row.rms) == pytest.approx(difference(images, exact), rel=1e-6)
        assert asdict(row.pixels) == pixel_figures(pixels, original)
        seconds = compared.timings["rows"][row.name]
        assert asdict(row.seconds) == {key: seconds[key] for key in ("median", "min", "max")}
        assert row.rate == compared.timings["rows"][ORIGINAL]["median"] / seconds["median"]
    assert (compared.rows[0].relative, compared.rows[0].max, compared.rows[1].max) == (0, 0, 0)
    assert compared.rows[2].max > 0.1
    kept = np.concatenate([np.load(path) for path in sorted((compared.out / "exact").iterdir())])
    assert np.array_equal(kept, exact.numpy())
    manifest = figures(folder_of(compared.of, "STARFlow") / "manifest.json")
    assert (manifest["guidance"], manifest["denoise"], manifest["certify"]) == (asdict(GUIDANCE), 0.8, False)
    assert figures(folder_of(compared.of, "auto:1e-2") / "manifest.json")["certify"]


def test_timings_are_of_the_first_batch(compared: SimpleNamespace) -> None:
    assert set(compared.timings["rows"]) == set(NAMES)
    assert (compared.timings["batch_size"], compared.timings["repeats"]) == (4, 1)
    assert compared.timings["denoise_seconds"] > 0
    exact, _ = draw_row(compared.of, ORIGINAL, 4, rate=0)
    for name, found in compared.timings["rows"].items():
        assert found["min"] == found["median"] == found["max"] > 0
        want = difference(draw_row(compared.of, name, 4, rate=0)[0], exact)[0]
        # The loop of the original code differs by rounding.
        assert found["error"] == pytest.approx(want, rel=1e-4) if name != ORIGINAL else 0 < found["error"] < 1e-4
    assert figures(compared.out / "timings.json") == compared.timings


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
    starflow = PEERS["STARFlow"]

    def overflows(*args: Any, **kwargs: Any) -> Any:
        found = starflow(*args, **kwargs)
        return replace(found, images=found.images.index_fill(0, torch.tensor([1]), value))

    monkeypatch.setitem(PEERS, "STARFlow", overflows)  # type: ignore[arg-type]
    found = experiment(tmp_path, (ORIGINAL, "STARFlow"))
    begin(found)
    for _ in range(2):  # the second time from the records
        row = scored(found, 8)[1]
        assert (row.max, row.rms) == (math.inf, math.inf)


# -------------------------------------------------------------------------------------------------------------- resume


def test_a_stopped_run_is_resumed(compared: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, starflow, calls = replace(compared.of, out=tmp_path / "out"), PEERS["STARFlow"], [0]

    def stops(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:  # in the second shard
            raise KeyboardInterrupt
        return starflow(*args, **kwargs)

    begin(found)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(PEERS, "STARFlow", stops)  # type: ignore[arg-type]
        silent(found, "STARFlow", NUM)
    (drawn,) = found.out.rglob("*.npz")
    stamp = drawn.stat().st_mtime_ns
    begin(found)
    assert scored(found, timing=compared.timings) == compared.rows
    assert contents(found.out, "*.npz") == contents(compared.out, "*.npz")
    assert drawn.stat().st_mtime_ns == stamp


def test_again_draws_and_times_nothing(compared: SimpleNamespace, copied: Experiment) -> None:
    before = stamps(copied.out)
    for count in (len(NAMES), 3):
        fewer = replace(copied, names=NAMES[:count])
        begin(fewer)
        assert scored(fewer) == compared.rows[:count]
    assert stamps(copied.out) == before


def test_rows_and_samples_are_added(compared: SimpleNamespace, copied: Experiment) -> None:
    before = contents(copied.out, "*.npz")
    more = replace(copied, names=(*NAMES, "window:3"), labels=torch.arange(28) % 3)
    begin(more)
    assert timings(more, 1)["rows"].keys() == {*NAMES, "window:3"}
    for name in (ORIGINAL, "STARFlow"):
        folder = silent(more, name, 28)
        assert np.array_equal(on_disk(folder.path)[:NUM], on_disk(folder_of(compared.of, name)))
    after = contents(copied.out, "*.npz")
    assert all(after[path] == data for path, data in before.items() if "00002" not in path)  # which had to grow
    assert largest_row(copied.out) == 28
    assert silent(more, "STARFlow", NUM).manifest.num == 28  # what was begun for more stays
    with pytest.raises(ValueError, match="sequential: is of 28 samples, labels are given for 20; give them all"):
        begin(copied)


@pytest.mark.parametrize("damage", ["missing", "short", "broken"])
def test_lost_exact_images_are_drawn_again(damage: str, compared: SimpleNamespace, copied: Experiment) -> None:
    path = copied.out / "exact" / "00000008.npy"
    want = path.read_bytes()
    path.unlink()
    if damage == "short":
        np.save(path, np.load(compared.out / "exact" / "00000008.npy")[:5])
    if damage == "broken":
        path.write_bytes(want[:100])
    (folder_of(copied, "STARFlow") / "shards" / "00001.json").unlink()
    assert scored(copied)[4] == compared.rows[4]
    assert path.read_bytes() == want


@pytest.mark.parametrize("entry", ["processor", "threads", "repeats", "digest"])
def test_timings_are_of_this_machine_and_these_rows(entry: str, copied: Experiment) -> None:
    """Made anew otherwise; drawing may resume with other threads."""
    kept = figures(copied.out / "timings.json")
    kept["rows"]["jacobi-2"]["median"] = 1234.5
    place = kept if entry == "repeats" else kept["rows"]["jacobi-2"] if entry == "digest" else kept["machine"]
    place["strategy_sha256" if entry == "digest" else entry] = "another"
    (copied.out / "timings.json").write_text(json.dumps(kept))
    assert (timings(copied, 1) == kept) == (entry == "threads")
    (copied.out / "timings.json").write_text("{")
    assert timings(copied, 1)["rows"]["jacobi-2"]["median"] < 1234.5


def test_auto_keeps_its_plan(copied: Experiment) -> None:
    assert os.listdir(copied.out / "plans") == ["auto-1e-2.json"]
    plan = jf.Strategy.uniform(jf.Solver(jf.Window(5), stopping=jf.Tolerance(1e-2)), 2)
    plan.save(copied.out / "plans" / "auto-1e-2.json")
    begin(copied)
    assert copied.strategy("auto:1e-2") == plan
    with pytest.raises(ValueError, match=r"holds samples of .*strategy"):
        silent(copied, "auto:1e-2", NUM)


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 5}, "seed 0, not 5"), ({"guidance": None}, "guidance {'weight': 0.6"),
        ({"denoise": 1.0}, "denoise 0.8, not 1.0"), ({"shard_size": 4}, "shard_size 8, not 4"),
        ({"batch_size": 2}, "batch_size 4, not 2"), ({"flow": make_flow(num_classes=3, noise_std=0.1)}, "dtype torch"),
        ({"labels": torch.tensor([0, 1, 2, 0, 1] * 4)}, "other labels"),
        ({"flow": to_float32(make_flow(num_classes=3, noise_std=0.1, seed=1))}, "fingerprint"),
    ],
)  # fmt: skip
def test_another_experiments_folder_is_refused(change: dict[str, Any], words: str, copied: Experiment) -> None:
    before, other = contents(copied.out), replace(copied, **change)
    with pytest.raises(ValueError) as error:
        begin(other)
    assert f"holds samples of {words}" in str(error.value)
    assert str(error.value).endswith("; give another folder, or overwrite=True to replace them")
    assert contents(copied.out) == before
    begin(other, overwrite=True)
    assert {path for path in contents(copied.out) if not path.endswith(".lock")} == {
        "settings.json", "plans/auto-1e-2.json"
    }  # fmt: skip


def test_only_files_of_an_experiment_are_removed(copied: Experiment) -> None:
    out = copied.out
    foreign = {"notes.txt": b"", "rows/jacobi-2/notes.txt": b"", "exact/mine.npy": b"", "plans/mine.json": b"{}"}
    for name, data in foreign.items():
        (out / name).write_bytes(data)
    begin(replace(copied, seed=5), overwrite=True)
    assert foreign.items() <= contents(out).items()
    assert largest_row(out) == 0


@pytest.mark.parametrize("text", [None, "{"])
def test_lost_settings_are_named(text: str | None, copied: Experiment) -> None:
    settings = copied.out / "settings.json"
    settings.unlink() if text is None else settings.write_text(text)
    before = contents(copied.out)
    with pytest.raises(ValueError, match=r"settings.json is lost or broken; restore it, or .* overwrite=True"):
        begin(copied)
    assert contents(copied.out) == before
    begin(copied, overwrite=True)
    begin(copied)


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text('{"theme": "dark"}')
    (tmp_path / "timings.json").write_text("mine")
    before = contents(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"was not written by an experiment, .*; give another folder"):
            begin(experiment(tmp_path), overwrite)
        assert contents(tmp_path) == before


PLANNED = Prediction("an abacus", 4, None, 1.0, 2.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("names", "settings", "words"),
    [
        (("jacobi-2", "Jacobi-2"), {}, "row 'jacobi-2': given twice"), (("quickest",), {}, "'quickest': unknown"),
        (("[9-1-1-1]",), {}, "Stack names block 9"), (("planned.json",), {}, "planned for device an abacus"),
        ((), {"labels": torch.tensor([3])}, "label 3"), ((), {"denoise": -1.0}, "denoise=-1.0"),
        (("auto:x",), {}, "'auto:x': give auto, or auto:TOLERANCE"), (("auto", "auto:nan"), {}, "tolerance nan"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_at_the_start(
    names: tuple[str, ...], settings: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    jacobi = jf.Solver(jf.Whole(), stopping=jf.MaxSweeps(4))
    replace(jf.Strategy.uniform(jacobi, 2), prediction=PLANNED).save("planned.json")
    with pytest.raises(ValueError, match=words):
        begin(experiment(Path("out"), names, **settings))
    assert not Path("out").exists()


# ----------------------------------------------------------------------------------------------------------- finalists


def make_row(name: str, relative: float, rate: float) -> Row:
    return Row(name, 10, 5 * (1 + relative), relative, 0.1, 0.01, PixelDifference(0.1, 3), 0.0, Timing(1, 1, 1), rate)


@pytest.mark.parametrize(
    ("rows", "want"),
    [
        ([("a", 0.0, 2), ("b", 0.005, 3), ("auto", 0.0, 4), ("auto:1e-1", 0.009, 5)], ["b", "auto:1e-1"]),
        ([("a", 0.02, 9), ("b", -0.3, 3), ("auto", 0.02, 9), ("auto:1e-1", 0.0, 1)], ["b", "auto:1e-1"]),
        ([("a", WITHIN, 2), ("b", WITHIN + 1e-9, 3)], ["a"]),
        ([("a", 0.5, 2), ("auto", 0.0, 0.5)], ["auto"]),
        ([(SEQUENTIAL, 0.0, 1.2), ("a", 0.5, 2)], [SEQUENTIAL]),
        ([("automatic.json", 0.0, 9), ("a", 0.0, 2)], ["automatic.json"]),
        ([("a", math.nan, 9), ("auto", math.inf, 9)], []),
    ],
)
def test_finalists(rows: list[tuple[str, float, float]], want: list[str]) -> None:
    made = [make_row(ORIGINAL, 0.0, 1.0), *(make_row(*row) for row in rows)]
    assert finalists(made) == finalists(made[::-1]) == [ORIGINAL, *want]
