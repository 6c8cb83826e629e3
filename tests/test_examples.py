"""The examples run as they are, and what they print of themselves is so. Timings are not judged."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jacobiflow.adapters.swapped import Swapped

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


def fewer(passes: Sequence[int], close_passes: Sequence[int], transforms: int, features: int) -> bool:
    """Whether every transform has fewer passes than features, and with a tolerance no more than without."""
    assert len(passes) == len(close_passes) == transforms
    return all(1 <= close <= exact < features for exact, close in zip(passes, close_passes, strict=True))


def restored(flow: nn.Module) -> bool:
    return not any(isinstance(module, Swapped) for module in flow.modules())


def check_images(found: dict[str, Any]) -> None:
    samples, fast, close = found["samples"], found["fast"], found["close"]
    assert samples.shape == (10, 10, 64)
    assert samples.isfinite().all()
    assert found["identical"] is True
    assert same_bits(fast, samples)
    assert fewer(found["passes"], found["close_passes"], 5, 64)
    assert found["error"] == (close - samples).abs().max()
    assert 0 < found["error"] < 0.05  # the residual's bound, amplified
    assert found["levels"] < 0.25
    assert sum(found["losses"][-50:]) / 50 < sum(found["losses"][:50]) / 50 - 20
    assert restored(found["flow"])


def check_density(found: dict[str, Any]) -> None:
    assert len(found["passes"]) == 5
    assert max(found["passes"]) < 30
    assert found["loss"] == found["own_loss"]
    gradient, own = found["gradient"], found["own_gradient"]
    assert found["difference"] == (gradient - own).norm() / own.norm()
    assert found["difference"] < 1e-5
    assert found["trained"] > found["untrained"] + 30
    assert restored(found["flow"])
    assert found["held_out"]() == found["trained"]  # by normflows alone


def check_posterior(found: dict[str, Any]) -> None:
    assert list(found["results"]) == ["maf", "zuko_nsf"]
    assert found["identical"] is True
    for result in found["results"].values():
        samples = result["samples"]
        assert same_bits(result["fast"], samples)
        assert fewer(result["passes"], result["close_passes"], 3, 16)
        assert 0 < result["error"] < 0.05
        spread = samples.std(dim=0)
        off = (samples.mean(dim=0) - found["truth"]) / spread
        assert off.abs().max() < 3
        assert off.square().mean().sqrt() < 1.5
        assert (spread[:4] < 0.6 * found["prior"].stddev[:4]).all()  # the cases say more than the prior
    assert restored(found["posterior"].posterior_estimator)


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "nflows_images": check_images,
    "normflows_density": check_density,
    "sbi_posterior": check_posterior,
    "zuko_images": check_images,
}


def without_numbers(text: str) -> list[str]:
    """Lines that are not empty, a # for each number and one space for many."""
    lines = (re.sub(r"-?\d[\d,.]*\d(e[+-]\d+)?|-?\d", "#", " ".join(line.split())) for line in text.splitlines())
    return [line for line in lines if line]


def shown(name: str) -> str:
    """The output of an example in examples/README.md."""
    section = (EXAMPLES / "README.md").read_text(encoding="utf-8").split(f"python examples/{name}.py\n")[1]
    return section.split("```")[0]


def test_every_example_is_checked() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_claims(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        found = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    CHECKS[name](found)
    assert without_numbers(capsys.readouterr().out) == without_numbers(shown(name))
    assert {path.name for path in tmp_path.iterdir()} <= {"sbi-logs"}  # sbi's own
