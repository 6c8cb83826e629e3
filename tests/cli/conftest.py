"""A folder with tiny models and other input for the commands, and command lines that run in it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import jacobiflow as jf
from tests.helpers.problems import make_flow, to_float32
from tests.helpers.running import run_line
from tests.helpers.training_runs import contents


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """The same rounding as in what a command is compared with."""


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of all commands; nothing is written there. A module may have one of its own."""
    folder = tmp_path_factory.mktemp("work")
    flow = to_float32(make_flow(num_classes=3, noise_std=0.1, num_blocks=3))
    flow.save_pretrained(folder / "model")
    to_float32(make_flow()).save_pretrained(folder / "plain")  # no classes, no noise to remove
    jf.Strategy.uniform(jf.Solver(jf.Window(4)), 3, 1e-2).save(folder / "window.json")
    images = torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    report = jf.calibrate(flow, images, torch.arange(9) % 3, segments=4, num_convergence_samples=3)
    report.save(folder / "report.json")
    replace(report, fingerprint="0" * 64).save(folder / "other.json")
    rng = np.random.default_rng(0)
    for name, classes in (("pets", 3), ("herd", 5)):
        for i in range(3 * classes):
            place = folder / name / f"class{i // 3}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(place / f"{i}.png")
    (folder / "file").write_text("no model, no JSON, no image")
    return folder


@pytest.fixture
def run(work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command line on a screen of 80 columns; gives its exit code, stdout and stderr."""
    monkeypatch.chdir(work)
    monkeypatch.setenv("COLUMNS", "80")
    return partial(run_line, capsys=capsys)


@pytest.fixture
def refuse(run: Any, work: Path, tmp_path: Path) -> Callable[[str, str], None]:
    """Asserts that a command line ends with exit 2 and one line that has `message` in it, and changes no file."""

    def check(line: str, message: str) -> None:
        before = contents(work), contents(tmp_path)
        result = run(line)
        assert (result.code, result.out) == (2, "")
        assert re.fullmatch(r"error: [^\n]{1,300}\n", result.err), result.err
        assert message in result.err
        assert (contents(work), contents(tmp_path)) == before

    return check
