"""A folder that a run trains in: what is not of this run is refused, and everything stays as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import SETTINGS, assert_same, checkpoint, contents, error_of, fit, fresh, some_digits

from jacobiflow.data import Augmentation, ImageDataset
from jacobiflow.locking import FolderInUseError, locked
from jacobiflow.training import problems, read_metrics, train

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = replace(SETTINGS, steps=2, checkpoint_every=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    fit(out, SHORT)
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A run of two steps."""
    return shutil.copytree(trained, tmp_path / "run")


def refuse(out: Path, words: str, call: Callable[[], object] | None = None) -> None:
    before = contents(out.parent)
    assert words in error_of(call or partial(fit, out, SHORT))
    assert contents(out.parent) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed=0, not 1"),
        ({"batch_size": 9, "learning_rate": 0.1}, "batch_size=8, not 9; learning_rate=0.001, not 0.1"),
        ({"weight_decay": 0.1, "bf16": True}, "weight_decay=0.0001, not 0.1; bf16=False, not True"),
    ],
)
def test_a_run_goes_on_with_its_own_settings_only(run: Path, change: dict[str, Any], words: str) -> None:
    refuse(run, words, partial(fit, run, replace(SHORT, **change)))


def test_a_run_goes_on_with_its_own_images_only(run: Path) -> None:
    data = some_digits()
    assert data.labels is not None
    for other in (
        some_digits(42), ImageDataset(data.images.flip(0), data.labels), ImageDataset(data.images, data.labels.flip(0))
    ):  # fmt: skip
        refuse(run, "of a run on other images or labels", partial(train, fresh(), other, SHORT, run))


def test_a_checkpoint_of_an_earlier_version_goes_on(run: Path) -> None:
    """It has neither settings nor images; or no settings of what came later, which are at their defaults then."""
    state = checkpoint(run)
    settings = {name: value for name, value in state["settings"].items() if name != "augmentation"}
    torch.save(state | {"settings": settings}, run / "checkpoint.pt")
    mirrored = replace(SHORT, augmentation=Augmentation(mirror=True))
    refuse(run, "of a run with other settings (augmentation=", partial(fit, run, mirrored))
    torch.save(
        {name: value for name, value in state.items() if name not in ("settings", "data")}, run / "checkpoint.pt"
    )
    fit(run, replace(SHORT, steps=3))
    assert checkpoint(run)["step"] == 3


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"metrics.jsonl": "mine"}, "metrics.jsonl: line 1 is not of this trainer; move it away"),
        ({"metrics.jsonl": '{"step": 1}\n'}, "metrics.jsonl: line 1 is not of this trainer"),
        ({"config.json": "{}"}, "config.json: of a model, without the checkpoint.pt of its training; move it away"),
        ({"model.safetensors": "mine"}, "model.safetensors: of a model, without"),
        ({"report.json": "{}"}, "report.json: of a model, without"),
        ({"checkpoint.pt": "mine"}, "checkpoint.pt: not a checkpoint of this trainer"),
    ],
)
def test_a_folder_of_something_else_is_refused(tmp_path: Path, files: dict[str, str], words: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    refuse(tmp_path, words)


def test_a_model_that_is_not_of_this_run_is_refused(run: Path, tmp_path: Path) -> None:
    (run / "checkpoint.pt").rename(tmp_path / "checkpoint.pt")
    refuse(run, "metrics.jsonl: of 2 steps, without their checkpoint.pt; bring it back, or move it away")
    (run / "metrics.jsonl").unlink()
    refuse(run, "config.json: of a model, without the checkpoint.pt of its training")
    (tmp_path / "checkpoint.pt").rename(run / "checkpoint.pt")
    (run / "config.json").write_text((run / "config.json").read_text().replace('"nvp": true', '"nvp": false'))
    refuse(run, "config.json: of another flow than this run's; move it away")
    (run / "config.json").write_text("mine")
    refuse(run, "config.json: not of a model that jacobiflow wrote; move it away")
    (run / "config.json").unlink()
    refuse(run, "model.safetensors: weights without a config.json that jacobiflow wrote; move it away")


def test_one_run_at_a_time(run: Path, tmp_path: Path) -> None:
    with locked(run), pytest.raises(FolderInUseError, match="another run is writing to it"):
        fit(run, SHORT)

    def again(_: object) -> None:
        with pytest.raises(FolderInUseError):
            fit(tmp_path / "new", SHORT)
        with pytest.raises(FolderInUseError):
            fresh().save_pretrained(tmp_path / "new")

    fit(tmp_path / "new", SHORT, on_step=again)
    assert [figures["step"] for figures in read_metrics(tmp_path / "new")] == [1, 2]


def test_what_is_asked_at_the_start_may_refuse_and_an_error_leaves_no_new_folder(run: Path, tmp_path: Path) -> None:
    starts: list[int] = []

    def on_start(done: int) -> None:
        starts.append(done)
        raise ValueError("no")

    for out in (run, tmp_path / "new" / "inner"):
        refuse(out, "no", partial(fit, out, SHORT, on_start=on_start))
    assert starts == [2, 0]
    assert not (tmp_path / "new").exists()


def test_without_its_metrics_a_run_goes_on(run: Path, tmp_path: Path) -> None:
    (run / "metrics.jsonl").unlink()
    fit(run, replace(SHORT, steps=3))
    fit(tmp_path / "other", SHORT)
    fit(tmp_path / "other", replace(SHORT, steps=3))
    assert_same(checkpoint(run), checkpoint(tmp_path / "other"))
    assert [figures["step"] for figures in read_metrics(run)] == [3]


@pytest.mark.parametrize("kind", ["flow", "data", "config"])
def test_other_objects_are_refused(tmp_path: Path, kind: str) -> None:
    given: dict[str, Any] = {"flow": fresh(), "data": some_digits(), "config": SHORT} | {kind: "x"}
    with pytest.raises(TypeError, match=f"{kind}='x' of type str: give "):
        train(given["flow"], given["data"], given["config"], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_all_problems_are_named(run: Path) -> None:
    assert list(problems(run)) == []
    log, config = run / "metrics.jsonl", run / "config.json"
    log.write_text(f"mine\n{log.read_text().splitlines()[0]}\nyours\n")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"nvp": False}))
    (run / f".checkpoint.pt.{'0' * 16}.partial").write_text("")
    metrics, left = "lacks some of the 2 steps", "left by a run that was killed"
    for found, words in zip(problems(run), ("2 lines are not", metrics, "of another flow", left), strict=True):
        assert found.startswith(str(run)) and words in found and "; " in found
    log.write_bytes(b"\xff")
    (run / "checkpoint.pt").write_bytes(b"mine")
    assert [words in found for found, words in zip(problems(run), ("not a checkpoint", "1 lines", left), strict=True)]
    for path in (log, run / "checkpoint.pt"):
        path.unlink()
    assert ["missing" in found or "cannot be read" in found for found in problems(run)] == [True, True, False]
