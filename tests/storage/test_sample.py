"""`sample_to_folder`: every shard is what `sample` draws of its latents, and settings that are refused lose nothing."""

from __future__ import annotations

import re
import shutil
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import make_flow, to_float32
from sample_folders import eight_bit, everything, pixels_in
from torch import Tensor

import jacobiflow as jf
from jacobiflow.latents import draw_latents
from jacobiflow.storage import Drawn, draw_by_strategy, figures_of, total
from jacobiflow.storage import sample as module

NUM = 10
SETTINGS: dict[str, Any] = {"strategy": "jacobi-3", "batch_size": 2, "shard_size": 4}
GUIDANCE = jf.Guidance(0.7, annealed=False, on="shift", attn_temperature=0.8)
SOMETIMES = jf.Strategy.uniform(jf.Solver(stopping=jf.Tolerance(1e-4) | jf.MaxSweeps(12)), 2)


@cache
def small() -> jf.TarFlow:
    """A flow of three classes and 8x8 grey images."""
    return to_float32(make_flow(num_classes=3, noise_std=0.1))


def classes(num: int) -> Tensor:
    return torch.arange(num) % 3


def draw(out: Path, num: int = NUM, **changed: Any) -> jf.SampleFolder:
    """Samples of `small`."""
    given = {"labels": classes(num), "progress": False, **SETTINGS, **changed}
    return jf.sample_to_folder(small(), num, out, **given)


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
    "sizes by default": {"batch_size": None, "shard_size": None},
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
    size, batch_size = given.pop("shard_size") or 1020, given.pop("batch_size") or NUM  # 102 batches of 10
    assert (folder.manifest.batch_size, folder.manifest.shard_size, folder.drawn) == (batch_size, size, NUM)
    for i, samples in enumerate(by_sample(small(), NUM, size, given.pop("labels"), batch_size=batch_size, **given)):
        assert torch.equal(images[size * i], samples.images)
        assert np.array_equal(folder.images(i).permute(0, 2, 3, 1).numpy(), eight_bit(samples.images))
        record = folder.records()[i]
        assert record.labels == (None if samples.labels is None else tuple(samples.labels.tolist()))
        assert record.certificate == (None if samples.certificate is None else tuple(samples.certificate.tolist()))
        again = torch.stack([block.resolved_sequentially for block in samples.stats]).any(dim=0)
        assert again.any() or name != "some are solved again"
        assert list(record.resolved) == again.nonzero().flatten().tolist()
        assert record.figures["network_calls"] == samples.network_calls


def test_trained_digits_in_batches_of_two_sizes(tmp_path: Path) -> None:
    flow, labels = jf.load("digits-p1"), torch.arange(7)
    given: dict[str, Any] = {"strategy": "window:16", "denoise": 1.0, "seed": 3}
    found = []
    for size in (5, 4):
        folder = jf.sample_to_folder(
            flow, 7, tmp_path / str(size), labels, batch_size=size, shard_size=size, progress=False, **given
        )
        found.append(pixels_in(folder).astype(int))
        want = torch.cat([samples.images for samples in by_sample(flow, 7, size, labels, batch_size=size, **given)])
        assert np.array_equal(found[-1], eight_bit(want))
    assert abs(found[0] - found[1]).max() <= 1, "more than a level apart"


def test_lost_samples_are_black_and_listed(tmp_path: Path) -> None:
    flow = to_float32(make_flow(image_size=6))
    with torch.no_grad():
        flow.blocks[0].proj_out.bias[:4] = 1  # some samples grow token by token, until their exact inverse overflows
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = by_sample(flow, NUM, 4, None, strategy="jacobi", batch_size=2)
        folder = jf.sample_to_folder(flow, NUM, tmp_path, progress=False, **{**SETTINGS, "strategy": "jacobi"})
    images, certificate = torch.cat([samples.images for samples in want]), folder.certificate()
    lost = ~images.isfinite().flatten(1).all(dim=1)
    assert 0 < lost.sum() < NUM
    assert torch.equal(folder.lost(), lost)
    assert np.array_equal(pixels_in(folder), eight_bit(images))
    assert certificate is not None
    assert torch.equal(certificate.isinf(), lost)


def test_sizes_by_default(tmp_path: Path) -> None:
    flow = to_float32(make_flow(image_size=4))
    for num, batch_size, want in ((3, None, (3, 1023)), (65, None, (64, 1024)), (3, 2000, (2000, 2000))):
        given: dict[str, Any] = {"strategy": "jacobi-1", "certify": False, "batch_size": batch_size}
        folder = jf.sample_to_folder(flow, num, tmp_path / str(want[0]), progress=False, **given)
        assert (folder.manifest.batch_size, folder.manifest.shard_size) == want


# ------------------------------------------------------------------------------------------------------------ strategy


@pytest.mark.parametrize("name", ["auto", "auto:1e-2"])
def test_auto_is_planned_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [jf.Strategy.uniform(jf.Solver(jf.Window(size)), 2) for size in (4, 5)]
    monkeypatch.setattr(module, "choose", lambda *_, **__: plans.pop(0))
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path, strategy=name, on_shard=interrupt)
    draw(tmp_path, strategy=name)
    folder = draw(tmp_path, 17, strategy=name)
    assert len(plans) == 1
    assert (folder.manifest.strategy, folder.manifest.tolerance) == (name, None)
    want = by_sample(small(), 17, 4, classes(17), strategy="window:4", batch_size=2)
    assert np.array_equal(pixels_in(folder), eight_bit(torch.cat([samples.images for samples in want])))


def test_auto_is_planned_for_the_batch(tmp_path: Path) -> None:
    assert draw(tmp_path, 4, strategy="auto").strategy() == jf.strategy.auto(small(), 2)


def test_a_report_gives_a_name_its_guesses_and_leaves_a_file_its_own(tmp_path: Path) -> None:
    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    report = jf.calibrate(small(), images, classes(6))
    named = draw(tmp_path / "named", strategy="window:5", report=report)
    assert named.strategy() == jf.Strategy.parse("window:5", report)
    path, mine = tmp_path / "s.json", jf.Strategy.uniform(jf.Solver(jf.Window(5), guess=jf.Zeros()), 2)
    mine.save(path)
    assert draw(tmp_path / "file", strategy=path, report=report).strategy() == mine
    assert draw(tmp_path / "file", strategy=str(path), report=report).drawn == 0


def test_overwriting_keeps_the_strategy_file_that_it_is_given(drawn: Path, tmp_path: Path) -> None:
    shutil.copytree(drawn, tmp_path / "out")
    folder = draw(tmp_path / "out", strategy=tmp_path / "out" / "strategy.json", overwrite=True)
    assert folder.drawn == NUM
    assert np.array_equal(pixels_in(folder), pixels_in(jf.SampleFolder.open(drawn)))


# ---------------------------------------------------------------------------------------------------- what is refused

OTHERS: dict[str, dict[str, Any]] = {
    "denoise 0.0, not 1.0": {"denoise": 1.0},
    "strategy jacobi-3, not a Strategy": {"strategy": SOMETIMES},
    "guidance None, not {'weight': 0.7, ": {"guidance": GUIDANCE},
    "files npz, not png": {"files": "png"},
    "certify True, not False": {"certify": False},
    "other labels": {"labels": classes(NUM) * (torch.arange(NUM) != NUM - 2)},
}

UNFIT: dict[str, dict[str, Any]] = {
    "strategy 'quickest': unknown": {"strategy": "quickest"},
    "stops after a number of sweeps": {"tolerance": 1e-3},
    "num=0: give a positive whole number": {"num": 0, "labels": None},
    "num=2.5: give a positive whole number": {"num": 2.5, "labels": None},
    "batch_size=-1: give a positive whole number": {"batch_size": -1},
    "shard_size=True: give a positive whole number": {"shard_size": True},
    "shard_size=3: give a multiple of the batch size, 2": {"shard_size": 3},
    "files='bmp': give npz or png": {"files": "bmp"},
    "seed=-1: give a whole number of at least 0": {"seed": -1},
    "denoise=-1.0: give 0": {"denoise": -1.0},
    "label 9: this flow has classes 0 to 2": {"labels": torch.arange(NUM)},
    "give 10 whole numbers": {"labels": torch.zeros(9, dtype=torch.int64)},
    "labels of type list: give a torch.Tensor": {"labels": [0] * NUM},
    "guidance=0.5: give a Guidance": {"guidance": 0.5},
}


@pytest.mark.parametrize("words", [*OTHERS, *UNFIT])
def test_settings_that_are_refused_lose_nothing(words: str, drawn: Path, tmp_path: Path) -> None:
    before = everything(drawn)
    for overwrite in (False, True) if words in UNFIT else (False,):
        with pytest.raises(ValueError, match=re.escape(words)):
            draw(drawn, overwrite=overwrite, **{**OTHERS, **UNFIT}[words])
        assert everything(drawn) == before
    if words in UNFIT:
        with pytest.raises(ValueError, match=re.escape(words)):
            draw(tmp_path / "new", **UNFIT[words])
        assert not (tmp_path / "new").exists()


def test_two_channels_are_no_png(tmp_path: Path) -> None:
    flow = to_float32(make_flow(in_channels=2, image_size=4))
    with pytest.raises(ValueError, match=r"^files='png': holds images of 1 or 3 channels, not 2; give npz$"):
        jf.sample_to_folder(flow, 2, tmp_path, files="png", **SETTINGS)
    assert jf.sample_to_folder(flow, 2, tmp_path, progress=False, **SETTINGS).images(0).shape == (2, 2, 4, 4)


# ------------------------------------------------------------------------------------------------------------- figures


def test_figures_are_those_of_the_samples_and_add_up() -> None:
    drawn = [
        jf.sample(small(), 3, classes(3), seed, strategy=SOMETIMES, denoise=0.5, progress=False) for seed in (0, 1)
    ]
    one, two = figures = [figures_of(samples) for samples in drawn]
    sums = ("seconds", "denoise_seconds", "network_calls", "token_evaluations", "resolved_sequentially")
    for samples, found in zip(drawn, figures, strict=True):
        assert found == {name: getattr(samples, name) for name in sums} | {
            "status": {state.name.lower(): samples.status.tolist().count(state) for state in jf.Status},
            "sweeps": [block.sweeps for block in samples.stats],
            "block_seconds": [block.seconds for block in samples.stats],
            "threads": 1,
        }
    assert total(figures) == {name: one[name] + two[name] for name in sums} | {
        "status": {name: one["status"][name] + two["status"][name] for name in one["status"]},
        "sweeps": [a + b for a, b in zip(one["sweeps"], two["sweeps"], strict=True)],
        "block_seconds": [a + b for a, b in zip(one["block_seconds"], two["block_seconds"], strict=True)],
    }


def test_a_shard_says_how_far_it_is() -> None:
    shares: list[float] = []
    drawing = draw_by_strategy(small(), "jacobi-1", None, 0.0, False, 1)
    drawing(0, draw_latents(40, 16, 4), classes(40), shares.append)
    assert shares == pytest.approx([i / 6 for i in range(1, 7)])  # two blocks, three groups of 16 batches
