"""Every run says how many of its samples are certified, how many were solved again, and how many are not, and why."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import jacobiflow as jf
from tests.helpers.problems import make_flow, to_float32

pytestmark = pytest.mark.usefixtures("one_thread")


def outcome(flow: jf.TarFlow, num: int, **settings: object) -> tuple[str, list[str]]:
    """The sentence, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        samples = jf.sample(flow, num, **settings)  # type: ignore[arg-type]
    return str(samples.outcome), [str(warning.message) for warning in caught]


def test_certified_and_exact_samples_are_counted_without_a_warning() -> None:
    flow = make_flow()
    assert outcome(flow, 1, strategy="sequential") == (
        "1 sample: 1 exact, since every block was solved token by token", [],
    )  # fmt: skip
    assert outcome(flow, 4, strategy="jacobi", tolerance=1e-9) == (
        "4 samples: 4 certified to 1e-09", [],
    )  # fmt: skip
    solver = jf.Solver(stopping=jf.MaxSweeps(1) | jf.Tolerance(1e-9))
    assert outcome(flow, 4, strategy=jf.Strategy.uniform(solver, 2)) == (
        "4 samples: 4 exact, since every block was solved token by token; 4 solved again token by token", [],
    )  # fmt: skip
    assert outcome(flow, 4, strategy="jacobi", certify=False) == (
        "4 samples: not certified, since certificates were turned off", [],
    )  # fmt: skip


@pytest.mark.parametrize("strategy", ["jacobi-2", "[1-4-1-2]"])
def test_samples_of_a_number_of_sweeps_are_not_certified(strategy: str) -> None:
    flow = make_flow()
    largest = float(jf.sample(flow, 4, strategy=strategy).certificate.max())
    assert largest > 1e-2
    text = (
        "4 samples: not certified, since the strategy stops after a fixed number of sweeps; the largest residual is "
        f"{largest:.1e}"
    )
    assert outcome(flow, 4, strategy=strategy) == (text, [text])


def test_a_block_of_single_tokens_needs_no_tolerance() -> None:
    """The paper's strategies cut a tough block into as many segments as tokens: that is the exact loop."""
    assert outcome(make_flow(), 2, strategy="[0/1-16-1-1]")[0].startswith("2 samples: 2 exact")


def test_samples_above_the_tolerance_are_named_with_the_reason() -> None:
    flow = copy.deepcopy(jf.load("digits-p1")).bfloat16()
    samples = jf.sample(flow, 16, torch.arange(16) % 10, strategy="window:8", tolerance=1e-4)
    above = samples.certificate > 1e-4
    assert 0 < int(above.sum()) < 16
    text, caught = outcome(flow, 16, labels=torch.arange(16) % 10, strategy="window:8", tolerance=1e-4)
    assert caught == [text]
    assert "above the tolerance, up to" in text
    assert "by the rounding of the network" in text


def test_lost_samples_are_named_with_the_remedy() -> None:
    flow = to_float32(make_flow())
    z = torch.zeros(3, 16, 4)
    z[1] = 3.4e38
    with pytest.warns(UserWarning, match="^3 samples: 2 exact, .*; 1 lost, .*: lower the guidance"):
        samples = jf.decode(flow, z, strategy="sequential")
    assert samples.outcome.lost == 1
