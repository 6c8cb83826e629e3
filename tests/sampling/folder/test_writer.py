"""`sample_to_folder`: what `sample` draws, in the same bytes however often it is stopped, and nothing lost."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import jacobiflow as jf
from jacobiflow.distributed import Processes
from jacobiflow.models.latents import draw_latents
from jacobiflow.planner import auto
from jacobiflow.sampling.folder import SampleFolderError
from jacobiflow.sampling.folder import writer as module
from tests.helpers.problems import make_flow, to_float32
from tests.helpers.sample_folders import MACHINE, everything, facts, flip, pixels_in, run, tiny_flow
from tests.helpers.scoring import levels

pytestmark = pytest.mark.usefixtures("one_thread")
OTHER = jf.Strategy.uniform(jf.Solver(jf.Window(5)), 1)
REPLACE = "give another folder, or overwrite it"
SMALL = to_float32(make_flow(num_classes=3, noise_std=0.1))  # of 8x8 grey images
GUIDANCE = jf.Guidance(0.7, annealed=False, on="shift", attn_temperature=0.8)
DENOISED = jf.SamplingSettings(GUIDANCE, 0.9)
SOMETIMES = jf.Strategy.uniform(jf.Solver(stopping=jf.Tolerance(1e-4) | jf.MaxSweeps(12)), 2)
CLASSES = torch.arange(10) % 3


def draw(out: Path, flow: Any = SMALL, labels: Tensor | None = CLASSES, **changed: Any) -> jf.SampleFolder:
    settings = {"num": 10, "strategy": "jacobi-3", "batch_size": 2, "shard_size": 4, **changed}
    return jf.sample_to_folder(flow, out=out, labels=labels, **settings)


def by_shard(flow: Any, num: int, size: int, labels: Tensor | None, **settings: Any) -> list[jf.Samples]:
    """Samples of every shard by itself, by `sample`."""
    config, seed, shards = flow.config, settings.pop("seed", 0), []
    for start in range(0, num, size):
        latents = draw_latents(min(size, num - start), config.num_tokens, config.token_channels, seed, start)
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


# ------------------------------------------------------------------------------------------------------------- samples

CASES: dict[str, dict[str, Any]] = {
    "certified, labels below 0": {"strategy": "window:5", "tolerance": 1e-4, "seed": 2**63 - 1, "labels": CLASSES - 1},
    "guided, denoised, not certified": {"strategy": "[1-4-3-5]", "settings": DENOISED, "certify": False},
    "some solved again": {"strategy": SOMETIMES},
}


@pytest.mark.parametrize("name", CASES)
def test_every_shard_is_what_sample_draws_of_its_latents(name: str, tmp_path: Path) -> None:
    settings = {"flow": SMALL, "labels": CLASSES, **CASES[name]}
    folder = draw(tmp_path, **settings)
    want = by_shard(num=10, size=4, batch_size=2, **settings)
    assert np.array_equal(pixels_in(folder), levels(torch.cat([samples.images for samples in want])))
    assert folder.cost().network_calls == sum(samples.network_calls for samples in want)
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
    (tmp_path / "shards" / "00001.json").unlink()
    assert draw(tmp_path, sensitivity=True).num_new == 4
    with pytest.raises(SampleFolderError, match="holds samples of sensitivity True, not False; give another folder"):
        draw(tmp_path)
    assert draw(tmp_path, overwrite=True).sensitivity() is None


def test_auto_is_planned_once_for_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert draw(tmp_path / "auto", strategy="auto").strategy() == auto(SMALL, 2)
    plans, out = [jf.Strategy.uniform(jf.Solver(jf.Window(size)), 2) for size in (4, 5)], tmp_path / "to a tolerance"
    monkeypatch.setattr(module, "choose", lambda *_, **__: plans.pop(0))
    with pytest.raises(KeyboardInterrupt):
        draw(out, strategy="auto:1e-2", progress=interrupt_after(4))
    for num in (10, 17):
        folder = draw(out, num=num, labels=torch.arange(num) % 3, strategy="auto:1e-2")
    assert len(plans) == 1
    assert (folder.manifest.strategy, folder.strategy().solvers[0].partition) == ("auto:1e-2", jf.Window(4))


# -------------------------------------------------------------------------------------------------------- interruptions


def test_a_run_that_was_stopped_goes_on_after_its_last_shard(reference: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=interrupt_after(4))
    counts: list[tuple[int, int, str]] = []
    assert jf.SampleFolder.open(tmp_path).manifest.checksums is None
    assert run(tmp_path, progress=lambda *count: counts.append(count)).num_new == 6
    assert counts == [(4, 10, "samples"), (8, 10, "samples"), (10, 10, "samples")]
    assert facts(tmp_path) == facts(reference)
    assert run(tmp_path).num_new == 0


def test_a_run_that_was_stopped_before_its_first_shard_may_change(tmp_path: Path) -> None:
    for num, sizes in ((10, (10, 1020)), (100, (64, 1024))):  # the default ones
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, num, batch_size=None, shard_size=None, draw=interrupt)
        manifest = jf.SampleFolder.open(tmp_path).manifest
        assert (manifest.batch_size, manifest.shard_size) == sizes
    assert run(tmp_path, seed=3, plan=lambda: OTHER).strategy() == OTHER


def test_a_resume_warns_of_damage_and_of_another_machine(out: Path) -> None:
    machine = {"device": "cuda", "threads": 2}
    assert run(out, machine=machine).num_new == 0  # no warning
    flip(out / "shards" / "00001.npz")
    (out / "shards" / "00002.json").unlink()
    with pytest.warns(UserWarning) as caught:
        assert run(out, machine=machine).num_new == 6
    assert [str(warning.message) for warning in caught] == [
        f"{out}: shards [1] were damaged, and are drawn again",
        f"{out}: begun on another machine or by other versions: equal to rounding, not to the bit",
    ]
    assert jf.SampleFolder.open(out).manifest.machine == MACHINE


# ------------------------------------------------------------------------------------------------------------- refusals


def test_a_folder_of_other_files_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / ".hidden").write_text("mine")
    run(tmp_path, 2, overwrite=True)
    for name in ("00000.npz", "manifest.json"):
        other = tmp_path / f"folder of {name}"
        other.mkdir()
        (other / name).write_text("[]")
        with pytest.raises(ValueError, match=r": holds files that this command did not write; give a new or empty"):
            run(other, overwrite=True)
        assert everything(other) == {name: b"[]"}


def test_other_settings_are_refused_before_anything_is_changed(out: Path) -> None:
    before = everything(out)
    changes: dict[str, dict[str, Any]] = {
        "a run of 10 samples, more than 9; ask for as many,": {"num": 9},
        "samples of seed 0, not 1;": {"seed": 1},
        "samples of guidance None, not 0.7,attn_temperature=0.8,annealed=false,on=shift;": {
            "flow": tiny_flow().guided(GUIDANCE)
        },
        "samples of other labels or prompts;": {"labels": None},
        "samples of strategy 'invented', not 'a Strategy';": {"strategy": OTHER},
        "samples of another strategy;": {"plan": lambda: OTHER},
    }
    for words, changed in changes.items():
        pattern = re.escape(words).replace(r"\.\*", ".*")
        with pytest.raises(SampleFolderError, match=f"^{re.escape(str(out))}: holds {pattern} {REPLACE}$"):
            run(out, **changed)
        assert everything(out) == before
    assert run(out, model="another name").num_new == 0
    OTHER.save(out / "strategy.json")
    with pytest.raises(SampleFolderError, match=r"strategy\.json: has changed since its run wrote it; restore"):
        run(out)


UNFIT: dict[str, dict[str, Any]] = {
    "strategy 'quickest': unknown": {"strategy": "quickest"},
    "num=0: give a positive whole number": {"num": 0, "labels": None},
    "shard_size=3: give a multiple of the batch size, 2": {"shard_size": 3},
    "files='bmp': give 'npz' or 'png'": {"files": "bmp"},
    "give 10 classes": {"labels": torch.zeros(9, dtype=torch.int64)},
    "model=5 of type int: give a name": {"model": 5},
    "overwrite='no' of type str: give True or False": {"overwrite": "no"},
    "progress=5 of type int: give a function": {"progress": 5},
    "processes=0 of type int: give what": {"processes": 0},
    "part=2 of type int: give a jacobiflow.Part": {"part": 2},
    "overwrite=True: would remove the samples of other parts": {"part": jf.Part(1, 2)},
}


@pytest.mark.parametrize("words", UNFIT)
def test_settings_that_do_not_fit_lose_nothing(words: str, out: Path, tmp_path: Path) -> None:
    before = everything(out)
    for path in (out, tmp_path / "new"):
        with pytest.raises(jf.InputError, match=re.escape(words)):
            draw(path, **{"overwrite": True, **UNFIT[words]})
    assert not (tmp_path / "new").exists()
    assert everything(out) == before
    with pytest.raises(TypeError, match=r"^out=None of type NoneType: give a path$"):
        draw(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["images/1", "images", "shards"])
def test_no_file_is_replaced_or_removed_through_a_link(name: str, tmp_path: Path) -> None:
    out, theirs = run(tmp_path / "out", files="png").path, tmp_path / "theirs"
    shutil.move(out / name, theirs)
    (out / name).symlink_to(theirs)
    before = everything(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(
            SampleFolderError, match=rf"{name}: is a link; remove it, or give a link to the whole folder"
        ):
            run(out, files="png", overwrite=overwrite)
    assert everything(tmp_path) == before
    (tmp_path / "link").symlink_to(run(tmp_path / "elsewhere", files="png").path)
    assert run(tmp_path / "link", files="png", overwrite=True).num_new == 10


def test_samples_need_room_on_the_disk(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=159))
    before = everything(out)
    run(out)
    for path, num in ((out, 20), (out.parent / "new", 10)):
        with pytest.raises(SampleFolderError, match=r": the samples to draw take 0\.0 MB, 0\.0 MB are free; make ro"):
            run(path, num)
    assert everything(out) == before


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
    with pytest.raises(ValueError, match=r"^PNG files need Pillow: pip install 'jacobiflow\[cli\]', or give"):
        draw(tmp_path / "new", files="png")


def test_a_folder_that_a_process_does_not_see_is_refused(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processes, "run_on_rank_zero", lambda self, work: [work(), (out / "manifest.json").unlink()][0])
    with pytest.raises(jf.InputError, match=r": process 1 does not see it; give one on a shared disk$"):
        run(out, processes=Processes(1, 2))
