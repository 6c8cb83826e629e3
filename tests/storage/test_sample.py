"""`sample_to_folder`: every shard is what `sample` draws of its latents, and settings that are refused lose nothing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import make_flow, to_float32
from sample_folders import everything, pixels_in
from scoring import levels
from torch import Tensor

import jacobiflow as jf
from jacobiflow.latents import draw_latents
from jacobiflow.storage import Drawn, figures_of, total
from jacobiflow.storage import sample as module

pytestmark = pytest.mark.usefixtures("one_thread")
NUM = 10
SETTINGS: dict[str, Any] = {"strategy": "jacobi-3", "batch_size": 2, "shard_size": 4}
GUIDANCE = jf.Guidance(0.7, annealed=False, on="shift", attn_temperature=0.8)
SOMETIMES = jf.Strategy.uniform(jf.Solver(stopping=jf.Tolerance(1e-4) | jf.MaxSweeps(12)), 2)


SMALL = to_float32(make_flow(num_classes=3, noise_std=0.1))  # of 8x8 grey images


def classes(num: int) -> Tensor:
    return torch.arange(num) % 3


def draw(out: Path, num: int = NUM, **changed: Any) -> jf.SampleFolder:
    """Samples of `SMALL`."""
    given = {"progress": False, **SETTINGS, **changed}
    if "labels" not in given:
        given["labels"] = classes(num)
    return jf.sample_to_folder(SMALL, num, out, **given)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("drawn")).path


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def by_sample(flow: Any, num: int, size: int, labels: Tensor | None, **settings: Any) -> list[jf.Samples]:
    """What `sample` draws for every shard by itself."""
    config, seed, found = flow.config, settings.pop("seed", 0), []
    for start in range(0, num, size):
        latents = draw_latents(min(size, num - start), config.num_tokens, config.token_channels, seed, start)
        part = None if labels is None else labels[start : start + size]
        found.append(jf.sample(flow, latents=latents, labels=part, progress=False, **settings))
    return found


CASES: dict[str, dict[str, Any]] = {
    "window": {"strategy": "window:5", "tolerance": 1e-4},
    "counted, not certified": {"strategy": "[1-4-3-5]", "certify": False},
    "some are solved again": {"strategy": SOMETIMES},
    "guided and denoised": {"strategy": "jacobi", "guidance": GUIDANCE, "denoise": 0.9},
    "no labels": {"labels": None},
    "labels below 0": {"labels": torch.arange(NUM) % 4 - 1},
    "another seed": {"seed": 2**63 - 1},
}


@pytest.mark.parametrize("name", CASES)
def test_every_shard_is_what_sample_draws_of_its_latents(name: str, tmp_path: Path) -> None:
    given = {"labels": classes(NUM), **SETTINGS, **CASES[name]}
    images: dict[int, Tensor] = {}

    def on_shard(start: int, latents: Tensor, labels: Tensor | None, drawn: Drawn) -> None:
        images[start] = drawn.images

    folder = draw(tmp_path, on_shard=on_shard, **given)
    size, labels = given.pop("shard_size"), given.pop("labels")
    assert (folder.manifest.batch_size, folder.manifest.shard_size, folder.drawn) == (2, 4, NUM)
    for i, samples in enumerate(by_sample(SMALL, NUM, size, labels, **given)):
        assert torch.equal(images[size * i], samples.images)
        assert np.array_equal(folder.images(i).permute(0, 2, 3, 1).numpy(), levels(samples.images))
        record = folder.records()[i]
        assert record.labels == (None if samples.labels is None else tuple(samples.labels.tolist()))
        assert record.certificate == (None if samples.certificate is None else tuple(samples.certificate.tolist()))
        again = torch.stack([block.resolved_sequentially for block in samples.stats]).any(dim=0)
        assert again.any() or name != "some are solved again"
        assert list(record.resolved) == again.nonzero().flatten().tolist()
        assert record.figures["network_calls"] == samples.network_calls


def test_trained_digits_in_batches_of_two_sizes(tmp_path: Path) -> None:
    flow, labels, found = jf.load("digits-p1"), torch.arange(7), []
    for size in (5, 4):
        given: dict[str, Any] = {"strategy": "window:16", "denoise": 1.0, "seed": 3, "batch_size": size}
        folder = jf.sample_to_folder(flow, 7, tmp_path / str(size), labels, shard_size=size, progress=False, **given)
        found.append(pixels_in(folder).astype(int))
        want = torch.cat([samples.images for samples in by_sample(flow, 7, size, labels, **given)])
        assert np.array_equal(found[-1], levels(want))
    assert abs(found[0] - found[1]).max() <= 1, "more than a level apart"


def test_a_run_down_to_rounding_goes_on(tmp_path: Path) -> None:
    draw(tmp_path, tolerance=0.0, strategy="jacobi")
    assert draw(tmp_path, tolerance=0.0, strategy="jacobi").drawn == 0


def test_sizes_by_default(tmp_path: Path) -> None:
    flow = to_float32(make_flow(image_size=4))
    for num, batch_size, want in ((3, None, (3, 1023)), (65, None, (64, 1024)), (3, 2000, (2000, 2000))):
        given: dict[str, Any] = {"strategy": "jacobi-1", "certify": False, "batch_size": batch_size}
        folder = jf.sample_to_folder(flow, num, tmp_path / str(want[0]), progress=False, **given)
        assert (folder.manifest.batch_size, folder.manifest.shard_size) == want


def test_auto_is_planned_once_for_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert draw(tmp_path / "auto", 4, strategy="auto").strategy() == jf.strategy.auto(SMALL, 2)
    plans, out = [jf.Strategy.uniform(jf.Solver(jf.Window(size)), 2) for size in (4, 5)], tmp_path / "to a tolerance"
    monkeypatch.setattr(module, "choose", lambda *_, **__: plans.pop(0))
    with pytest.raises(KeyboardInterrupt):
        draw(out, strategy="auto:1e-2", on_shard=interrupt)
    draw(out, strategy="auto:1e-2")
    folder = draw(out, 17, strategy="auto:1e-2")
    assert len(plans) == 1
    assert (folder.manifest.strategy, folder.manifest.tolerance) == ("auto:1e-2", None)
    want = by_sample(SMALL, 17, 4, classes(17), strategy="window:4", batch_size=2)
    assert np.array_equal(pixels_in(folder), levels(torch.cat([samples.images for samples in want])))


def test_numbers_of_numpy_and_a_list_of_labels_go_on_with_the_same_run(drawn: Path) -> None:
    before = everything(drawn)
    same = {"seed": np.int64(0), "batch_size": np.uint8(2), "shard_size": np.int32(4), "denoise": np.float32(0)}
    draw(drawn, np.int64(NUM), labels=[*range(3)] * 3 + [0], **same)  # type: ignore[arg-type]
    assert everything(drawn) == before


def test_overwriting_keeps_the_strategy_file_that_it_is_given(drawn: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(drawn, tmp_path / "out"))
    folder = draw(out, strategy=out / "strategy.json", overwrite=True)
    assert folder.drawn == NUM
    assert np.array_equal(pixels_in(folder), pixels_in(jf.SampleFolder.open(drawn)))
    assert draw(out, strategy=str(out / "strategy.json")).drawn == 0


OTHERS: dict[str, dict[str, Any]] = {
    "denoise 0.0, not 1.0": {"denoise": 1.0},
    "strategy jacobi-3, not a Strategy": {"strategy": SOMETIMES},
    "guidance None, not {'weight': 0.7, ": {"guidance": GUIDANCE},
    "certify True, not False": {"certify": False},
    "other labels": {"labels": classes(NUM) * (torch.arange(NUM) != NUM - 2)},
}

UNFIT: dict[str, dict[str, Any]] = {
    "strategy 'quickest': unknown": {"strategy": "quickest"},
    "num=0: give a positive whole number": {"num": 0, "labels": None},
    "batch_size=0: give a positive whole number": {"batch_size": 0},
    "shard_size=0: give a positive whole number": {"shard_size": 0},
    "1,000,001 shards: the limit is 1,000,000; give a larger": {
        "num": 1_000_001,
        "batch_size": 1,
        "shard_size": 1,
        "labels": None,
    },
    "num=1000000000000000000000000000000: the limit is 100,000,000; give less": {"num": 10**30, "labels": None},
    "4,294,967,424 bytes of images in a shard": {
        "num": 10**8,
        "batch_size": 1,
        "shard_size": 2**26 + 2,
        "labels": None,
    },
    "shard_size=3: give a multiple of the batch size, 2": {"shard_size": 3},
    "files='bmp': give 'npz' or 'png'": {"files": "bmp"},
    "seed=-1: give a whole number, at least 0": {"seed": -1},
    "denoise=-1.0: give 0": {"denoise": -1.0},
    "label 9: this flow has classes 0 to 2": {"labels": torch.arange(NUM)},
    "give 10 whole numbers": {"labels": torch.zeros(9, dtype=torch.int64)},
}


@pytest.mark.parametrize("words", [*OTHERS, *UNFIT])
def test_settings_that_are_refused_lose_nothing(words: str, drawn: Path, tmp_path: Path) -> None:
    before, changed = everything(drawn), {**OTHERS, **UNFIT}[words]
    refused = pytest.raises(ValueError, match=re.escape(words))
    with refused:
        draw(drawn, **changed)
    if words in UNFIT:
        for out, overwrite in ((drawn, True), (tmp_path / "new", False)):
            with refused:
                draw(out, overwrite=overwrite, **changed)
        assert not (tmp_path / "new").exists()
    assert everything(drawn) == before


@pytest.mark.parametrize(("name", "value"), [("model", 5), ("model", None), ("among", 7), ("on_shard", 7), ("out", 5)])
def test_wrong_kinds_are_refused_by_name_before_anything_is_made(name: str, value: Any, tmp_path: Path) -> None:
    given: dict[str, Any] = {"out": tmp_path / "new", name: value}
    with pytest.raises(TypeError, match=rf"^{name}={value} of type {type(value).__name__}: give "):
        draw(given.pop("out"), **given)
    assert not list(tmp_path.iterdir())


def test_two_channels_are_no_png(tmp_path: Path) -> None:
    flow = to_float32(make_flow(in_channels=2, image_size=4))
    with pytest.raises(ValueError, match=r"^files='png': holds images of 1 or 3 channels, not 2; give npz$"):
        jf.sample_to_folder(flow, 2, tmp_path, files="png", **SETTINGS)
    assert jf.sample_to_folder(flow, 2, tmp_path, progress=False, **SETTINGS).images(0).shape == (2, 2, 4, 4)


def test_figures_are_those_of_the_samples_and_add_up() -> None:
    sums = ("seconds", "denoise_seconds", "network_calls", "token_evaluations", "resolved_sequentially")
    figures = []
    for seed in (0, 1):
        samples = jf.sample(SMALL, 3, classes(3), seed, strategy=SOMETIMES, denoise=0.5, progress=False)
        figures.append(figures_of(samples))
        assert figures[-1] == {name: getattr(samples, name) for name in sums} | {
            "exact": False,
            "status": {state.name.lower(): samples.status.tolist().count(state) for state in jf.Status},
            "sweeps": [block.sweeps for block in samples.stats],
            "block_seconds": [block.seconds for block in samples.stats],
            "threads": 1,
        }
    one, two = figures
    assert total(figures) == {name: one[name] + two[name] for name in sums} | {
        "exact": False,
        "status": {name: one["status"][name] + two["status"][name] for name in one["status"]},
        "sweeps": [a + b for a, b in zip(one["sweeps"], two["sweeps"], strict=True)],
        "block_seconds": [a + b for a, b in zip(one["block_seconds"], two["block_seconds"], strict=True)],
    }
    exact = figures_of(jf.sample(SMALL, 3, classes(3), strategy="sequential", progress=False))
    assert (exact["exact"], total([exact, exact])["exact"], total([exact, one])["exact"]) == (True, True, False)
