"""`sample_to_folder`: every shard is what `sample` draws of its latents, and settings that are refused lose nothing."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import jacobiflow as jf
from jacobiflow.latents import draw_latents
from jacobiflow.storage import sample as module
from tests.helpers.problems import make_flow, to_float32
from tests.helpers.sample_folders import everything, pixels_in
from tests.helpers.scoring import levels

pytestmark = pytest.mark.usefixtures("one_thread")
NUM = 10
SETTINGS: dict[str, Any] = {"strategy": "jacobi-3", "batch_size": 2, "shard_size": 4}
GUIDANCE = jf.Guidance(0.7, annealed=False, on="shift", attn_temperature=0.8)
SOMETIMES = jf.Strategy.uniform(jf.Solver(stopping=jf.Tolerance(1e-4) | jf.MaxSweeps(12)), 2)
SMALL = to_float32(make_flow(num_classes=3, noise_std=0.1))  # of 8x8 grey images


def classes(num: int) -> Tensor:
    return torch.arange(num) % 3


def draw(out: Path, num: int = NUM, flow: Any = SMALL, **changed: Any) -> jf.SampleFolder:
    labels = changed.pop("labels") if "labels" in changed else classes(num)
    return jf.sample_to_folder(flow, num, out, labels, **{**SETTINGS, **changed})


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
        found.append(jf.sample(flow, latents=latents, labels=part, **settings))
    return found


CASES: dict[str, dict[str, Any]] = {
    "window": {"strategy": "window:5", "tolerance": 1e-4},
    "counted, not certified": {"strategy": "[1-4-3-5]", "certify": False},
    "some are solved again": {"strategy": SOMETIMES},
    "guided and denoised": {"flow": SMALL.guided(GUIDANCE), "strategy": "jacobi", "denoise": 0.9},
    "another seed, labels below 0": {"seed": 2**63 - 1, "labels": torch.arange(NUM) % 4 - 1},
}


@pytest.mark.parametrize("name", CASES)
def test_every_shard_is_what_sample_draws_of_its_latents(name: str, tmp_path: Path) -> None:
    given = {"labels": classes(NUM), "flow": SMALL, **SETTINGS, **CASES[name]}
    seen: dict[int, jf.Samples] = {}
    folder = draw(tmp_path, on_shard=seen.__setitem__, **given)
    size, labels, flow = given.pop("shard_size"), given.pop("labels"), given.pop("flow")
    assert (folder.manifest.batch_size, folder.manifest.shard_size, folder.drawn) == (2, 4, NUM)
    want = by_sample(flow, NUM, size, labels, **given)
    for i, samples in enumerate(want):
        assert torch.equal(seen[size * i].images, samples.images)
        assert np.array_equal(folder.images(i).permute(0, 2, 3, 1).numpy(), levels(samples.images))
        assert folder.records()[i].cost.network_calls == samples.network_calls
    if given.get("certify", True):
        assert torch.equal(folder.certificate(), torch.cat([samples.certificate for samples in want]))  # type: ignore
    else:
        assert folder.certificate() is None
    again = [torch.stack([block.resolved_sequentially for block in samples.stats]).any(dim=0) for samples in want]
    assert torch.equal(folder.resolved(), torch.cat(again))
    assert folder.resolved().any() or name != "some are solved again"
    assert folder.outcome(16).resolved == folder.resolved().sum()


def test_trained_digits_in_batches_of_two_sizes(tmp_path: Path) -> None:
    flow, labels, found = jf.load("digits-p1"), torch.arange(7), []
    for size in (5, 4):
        given: dict[str, Any] = {"strategy": "window:16", "denoise": 1.0, "seed": 3, "batch_size": size}
        folder = jf.sample_to_folder(flow, 7, tmp_path / str(size), labels, shard_size=size, **given)
        found.append(pixels_in(folder).astype(int))
        want = torch.cat([samples.images for samples in by_sample(flow, 7, size, labels, **given)])
        assert np.array_equal(found[-1], levels(want))
    assert abs(found[0] - found[1]).max() <= 1, "more than a level apart"


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


def test_overwriting_keeps_the_strategy_file_that_it_is_given(drawn: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(drawn, tmp_path / "out"))
    folder = draw(out, strategy=out / "strategy.json", overwrite=True)
    assert folder.drawn == NUM
    assert np.array_equal(pixels_in(folder), pixels_in(jf.SampleFolder.open(drawn)))


OTHERS: dict[str, dict[str, Any]] = {
    "strategy 'jacobi-3', not 'a Strategy'": {"strategy": SOMETIMES},
    "guidance None, not Guidance(weight=0.7, ": {"flow": SMALL.guided(GUIDANCE)},
    "other labels": {"labels": classes(NUM) * (torch.arange(NUM) != NUM - 2)},
}
UNFIT: dict[str, dict[str, Any]] = {
    "strategy 'quickest': unknown": {"strategy": "quickest"},
    "num=0: give a positive whole number": {"num": 0, "labels": None},
    "shard_size=3: give a multiple of the batch size, 2": {"shard_size": 3},
    "files='bmp': give 'npz' or 'png'": {"files": "bmp"},
    "give 10 whole numbers": {"labels": torch.zeros(9, dtype=torch.int64)},
}


@pytest.mark.parametrize("words", [*OTHERS, *UNFIT])
def test_settings_that_are_refused_lose_nothing(words: str, drawn: Path, tmp_path: Path) -> None:
    before, changed = everything(drawn), {**OTHERS, **UNFIT}[words]
    with pytest.raises(ValueError, match=re.escape(words)):
        draw(drawn, **changed)
    if words in UNFIT:
        with pytest.raises(ValueError, match=re.escape(words)):
            draw(drawn, overwrite=True, **changed)
        with pytest.raises(ValueError, match=re.escape(words)):
            draw(tmp_path / "new", **changed)
        assert not (tmp_path / "new").exists()
    assert everything(drawn) == before


def test_samples_that_are_no_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of stored as images of other values."""
    monkeypatch.setattr(type(SMALL), "to_images", lambda self, x: x)
    with pytest.raises(ValueError, match=r"^samples of shape \(16, 4\) are not images .*; draw them with jac"):
        draw(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_png_is_for_one_channel_or_three_and_needs_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = to_float32(make_flow(in_channels=2, image_size=4))
    with pytest.raises(ValueError, match=r"^files='png': holds images of 1 or 3 channels, not 2; give npz$"):
        jf.sample_to_folder(flow, 2, tmp_path, files="png", **SETTINGS)
    assert jf.sample_to_folder(flow, 2, tmp_path, **SETTINGS).images(0).shape == (2, 2, 4, 4)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ValueError, match=r"^PNG files need Pillow: pip install 'jacobiflow\[cli\]', or give"):
        draw(tmp_path / "new", files="png")
