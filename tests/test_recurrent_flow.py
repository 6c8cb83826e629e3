"""A flow that is registered from outside goes wherever TarFlow and MAF go."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import examples.extending.recurrent_flow  # noqa: F401  registers the flow
import jacobiflow as jf
from jacobiflow.cli import main
from tests.helpers.running import run_line


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of a few training steps on digits, by the command line."""
    out = tmp_path_factory.mktemp("recurrent") / "model"
    line = "train --flow recurrent --images digits --image-size 8 --width 16 --blocks 2 --batch-size 32 --warmup 5"
    settings = f"--noise-std 0.2 --learning-rate 0.01 --steps 40 --out {out}"
    assert main([*line.split(), *settings.split()]) == 0
    return out


def test_its_samples_encode_to_their_latents(model: Path) -> None:
    flow, labels = jf.load(model, dtype="float64"), torch.tensor([0, 9, -1, 4])
    for strategy in ("sequential", "jacobi", "window:3", "auto"):
        guidance = jf.Guidance(0.5) if strategy == "jacobi" else None
        out = jf.sample(flow.guided(guidance), 4, labels, settings=None, strategy=strategy)
        assert out.residual.max() <= 1e-3
        if guidance is None:
            assert (flow.encode(out.images, labels)[0] - out.latents).abs().max() < 1e-2


@pytest.mark.parametrize(
    "line",
    [
        "info --model {model} --json {out}.json",
        "calibrate --model {model} --images digits --num 32 --convergence-samples 4 --out {out}",
        "plan --model {model} --batch-size 2 --out {out}.json",
        "sample --model {model} --num 3 --denoise 1 --strategy auto --out {out}",
    ],
)  # in this order: later ones plan by the report
def test_every_command_takes_it(line: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = line.split()[0]
    result = run_line(line.format(model=model, out=model.parent / name), capsys)
    assert result.code == 0, result.err
    if name == "calibrate":
        shutil.copy(model.parent / name / "report.json", model)
    if name == "sample":
        assert jf.SampleFolder.open(model.parent / name).residual().max() <= 1e-3
