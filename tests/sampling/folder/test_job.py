"""`sample_to_folder`: what `sample` draws, in the same bytes however often it is stopped, and nothing lost."""

from __future__ import annotations

import re
import shutil
import sys
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import jacobiflow as jf
from jacobiflow.data import quantize
from jacobiflow.jobs import JobFolderError
from jacobiflow.models.checkpoints.fingerprint import fingerprint
from jacobiflow.models.latents import draw_latents
from jacobiflow.planner import auto
from tests.helpers.kills import read_files
from tests.helpers.problems import make_flow, make_star, texts, to_float32
from tests.helpers.sample_folders import pixels_in, run, shards, tiny_flow
from tests.helpers.scoring import levels

pytestmark = pytest.mark.usefixtures("one_thread")
OTHER = jf.Strategy.uniform(jf.Solver(jf.Window(5)), 1)
REPLACE = re.escape("give another folder, or overwrite this one (--overwrite)")
SMALL = to_float32(make_flow(num_classes=3, noise_std=0.1))  # of 8x8 grey images
GUIDANCE = jf.Guidance(0.7, annealed=False, on="shift", attn_temperature=0.8)
DENOISED = jf.SamplingSettings(GUIDANCE, 0.9)
SOMETIMES = jf.Strategy.uniform(jf.Solver(stopping=jf.Stopping(12)), 2, 1e-4)
CLASSES = torch.arange(10) % 3


def draw(out: Path, flow: Any = SMALL, labels: Tensor | None = CLASSES, **changed: Any) -> jf.SampleFolder:
    settings = {"num": 10, "strategy": "jacobi-3", "batch_size": 2, "shard_size": 4, **changed}
    return jf.sample_to_folder(flow, out=out, labels=labels, **settings)


def by_shard(flow: Any, num: int, size: int, labels: Tensor | None, **settings: Any) -> list[jf.Samples]:
    """Samples of every shard by itself, by `sample`."""
    config, seed, shards = flow.config, settings.pop("seed", 0), []
    for start in range(0, num, size):
        latents = draw_latents(min(size, num - start), config.num_tokens, config.token_dim, seed, start)
        part = None if labels is None else labels[start : start + size]
        shards.append(jf.sample(flow, latents=latents, labels=part, **settings))
    return shards


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def interrupt_after(num: int) -> Callable[..., None]:
    return lambda done, *_: interrupt() if done > num else None


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    return run(tmp_path_factory.mktemp("reference")).path


@pytest.fixture
def out(reference: Path, tmp_path: Path) -> Path:
    """A copy of the undisturbed run."""
    return Path(shutil.copytree(reference, tmp_path / "out"))


CASES: dict[str, dict[str, Any]] = {
    "certified, labels below 0": {"strategy": "window:5", "tolerance": 1e-4, "seed": 2**63 - 1, "labels": CLASSES - 1},
    "guided, denoised, not certified": {"strategy": "[1-4-3-5]", "settings": DENOISED, "certify": False},
    "some solved again": {"strategy": SOMETIMES, "certify": False},
}


@pytest.mark.parametrize("name", CASES)
def test_every_shard_is_what_sample_draws_of_its_latents(name: str, tmp_path: Path) -> None:
    settings = {"flow": SMALL, "labels": CLASSES, **CASES[name]}
    folder = draw(tmp_path, **settings)
    want = by_shard(num=10, size=4, batch_size=2, **settings)
    assert np.array_equal(pixels_in(folder), levels(torch.cat([samples.images for samples in want])))
    assert folder.outcome().network_calls == sum(samples.outcome.network_calls for samples in want)
    if settings.get("certify", True):
        assert torch.equal(folder.residual(), torch.cat([samples.residual for samples in want]))  # type: ignore
    else:
        assert folder.residual() is None
    resolved = int(sum(samples.used_fallback.sum() for samples in want))
    assert folder.outcome().num_fallback == folder.used_fallback().sum() == resolved
    assert resolved > 0 or name != "some solved again"


def test_sensitivity_is_in_the_shards_and_the_outcome(tmp_path: Path) -> None:
    folder = draw(tmp_path, sensitivity=True)
    want = by_shard(SMALL, 10, 4, CLASSES, strategy="jacobi-3", batch_size=2, sensitivity=True)
    assert torch.equal(folder.sensitivity(), torch.cat([samples.sensitivity for samples in want]))  # type: ignore
    assert (folder.outcome().sensitivity, folder.outcome().num_sensitive) == (float(folder.sensitivity().max()), 0)  # type: ignore
    assert jf.SampleFolder.open(tmp_path).sensitivity() is not None
    with pytest.raises(JobFolderError, match="holds samples of sensitivity True, not False; give another folder"):
        draw(tmp_path)
    assert draw(tmp_path, overwrite=True).sensitivity() is None


def test_auto_is_planned_once_for_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert draw(tmp_path / "auto", strategy="auto").strategy() == auto(SMALL, 2)
    plans, out = [jf.Strategy.uniform(jf.Solver(jf.Window(size)), 2) for size in (4, 5)], tmp_path / "to a tolerance"
    monkeypatch.setattr("jacobiflow.sampling.request.auto", lambda *_: plans.pop(0))
    with pytest.raises(KeyboardInterrupt):
        draw(out, strategy="auto:1e-2", progress=interrupt_after(4))
    for num in (10, 17):
        folder = draw(out, num=num, labels=torch.arange(num) % 3, strategy="auto:1e-2")
    assert len(plans) == 1
    assert (folder.spec.strategy, folder.strategy().solvers[0].partition) == ("auto:1e-2", jf.Window(4))


def test_a_run_that_was_stopped_goes_on_after_its_last_shard(reference: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=interrupt_after(4))
    counts: list[tuple[int, int, str]] = []
    (problem,) = jf.SampleFolder.open(tmp_path).problems()
    assert problem.startswith(f"{tmp_path}: 4 of 10 samples are drawn; wait for the run, or give the same command")
    assert run(tmp_path, progress=lambda *count: counts.append(count)).num_new == 6
    assert [counts[0], counts[-1]] == [(1, 1, "samples"), (10, 10, "samples")]
    assert shards(tmp_path) == shards(reference)
    assert run(tmp_path).num_new == 0


def test_more_samples_are_added(reference: Path, out: Path) -> None:
    run(out.parent / "twelve", 12)
    assert run(out, 12).num_new == 4  # The last shard had two.
    assert shards(out) == shards(out.parent / "twelve")
    draw(out.parent / "grown", num=1, labels=CLASSES[:1])  # less than a batch
    assert shards(draw(out.parent / "grown").path) == shards(draw(out.parent / "ten").path)


def test_states_of_texts_may_be_in_bfloat16(tmp_path: Path) -> None:
    flow, states = deepcopy(make_star()).float(), texts(make_star(), 3).bfloat16()
    samples = jf.sample(flow, 3, context=states.float(), strategy="sequential")
    folder = jf.sample_to_folder(flow, 3, tmp_path, context=states, strategy="sequential")
    assert torch.equal(folder.images(0), quantize(samples.images))
    jf.sample(flow, 3, context=states, strategy="sequential").save(tmp_path / "saved")


def test_other_settings_are_refused_before_anything_is_changed(out: Path) -> None:
    before = read_files(out)
    changes: dict[str, dict[str, Any]] = {
        "num 10, not 1; seed 0, not 1;": {"num": 1, "seed": 1},  # Not batches of 1, which follow from `num`.
        "seed 0, not 1; certify True, not False;": {"seed": 1, "certify": False},
        "guidance None, not {'weight': 0.7, .*": {"flow": tiny_flow().guided(GUIDANCE)},
        "different labels or context;": {"labels": None},
        "different strategy;": {"plan": lambda: OTHER},
        "different flow;": {"flow": to_float32(make_flow(num_classes=3, noise_std=0.1, image_size=4, patch_size=2))},
    }
    for words, changed in changes.items():
        pattern = re.escape(words).replace(r"\.\*", ".*")
        with pytest.raises(JobFolderError, match=f"^{re.escape(str(out))}: holds samples of .*{pattern}.*{REPLACE}$"):
            run(out, **changed)
        assert read_files(out) == before
    assert run(out, 9, overwrite=True).num_new == 9


UNFIT: dict[str, dict[str, Any]] = {
    "strategy 'quickest': unknown": {"strategy": "quickest"},
    "num=0: give a positive whole number": {"num": 0, "labels": None},
    "shard_size=3: give a multiple of the batch size, 2": {"shard_size": 3},
    "files='bmp': give 'npz' or 'png'": {"files": "bmp"},
    "give 10 classes": {"labels": torch.zeros(9, dtype=torch.int64)},
    "overwrite='no' of type str: give True or False": {"overwrite": "no"},
    "progress=5 of type int: give a function": {"progress": 5},
}


@pytest.mark.parametrize("words", UNFIT)
def test_settings_that_do_not_fit_lose_nothing(words: str, out: Path, tmp_path: Path) -> None:
    before = read_files(out)
    for path in (out, tmp_path / "new"):
        with pytest.raises(jf.InputError, match=re.escape(words)):
            draw(path, **{"overwrite": True, **UNFIT[words]})
    assert not (tmp_path / "new").exists()
    assert read_files(out) == before
    with pytest.raises(TypeError, match=r"^out=None of type NoneType: give a path$"):
        draw(None)  # type: ignore[arg-type]


def test_samples_that_are_not_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(SMALL), "from_tokens", lambda self, x: x)
    with pytest.raises(ValueError, match=r"^samples of shape \(16, 4\), but .* says \(1, 8, 8\).*; draw them with jac"):
        draw(tmp_path)


def test_png_is_for_one_channel_or_three_and_needs_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flows = {num: to_float32(make_flow(in_channels=num, image_size=4)) for num in (2, 3)}
    with pytest.raises(
        ValueError, match=r"^files='png': for grey and colour images, and this flow has 2 channels; give 'npz'$"
    ):
        draw(tmp_path / "two", flows[2], labels=None, files="png")
    latents = draw(tmp_path / "two", flows[2], labels=None)
    want = jf.sample(flows[2], 4, batch_size=2, strategy="jacobi-3").images
    torch.testing.assert_close(latents.images(0), want, rtol=0, atol=1e-5)  # as drawn, not in 8 bits
    assert want.abs().max() > 1
    folder = draw(tmp_path / "three", flows[3], labels=None, files="png")
    with Image.open(folder.path / "images" / "00000001.png") as image:
        assert np.array_equal(np.asarray(image), folder.images(0)[1].permute(1, 2, 0).numpy())
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ValueError, match=r"^PNG files need Pillow: pip install pillow$"):
        draw(tmp_path / "new", files="png")


def test_a_folder_goes_on_with_the_same_bits_of_the_weights_only(tmp_path: Path) -> None:
    """The other flow has the same fingerprint: it differs by less than the rounding to bfloat16."""
    flow = deepcopy(SMALL)
    draw(tmp_path, SMALL)
    with torch.no_grad():
        next(flow.parameters()).mul_(1 + 2**-20)
    assert fingerprint(flow) == fingerprint(SMALL)
    with pytest.raises(JobFolderError, match="different weights;"):
        draw(tmp_path, flow)


def test_a_folder_knows_its_strategy_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SOMETIMES.save(tmp_path / "plan.json")
    monkeypatch.chdir(tmp_path)
    first = draw(Path("out"), strategy="./plan.json")
    again = draw(Path("out"), strategy=tmp_path / "plan.json", batch_size=None, shard_size=None)
    assert (first.num_new, again.num_new, again.spec) == (10, 0, first.spec)


def test_an_old_record_of_a_last_shard_is_not_called_damaged(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for num in (3, 6, 8):
            folder = draw(tmp_path, num=num, labels=CLASSES[:num], strategy="window:5")
            assert folder.problems() == []
