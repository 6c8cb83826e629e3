"""CUDA graphs on the fake device: answers of the CPU, and graphs of shapes that come again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import jacobiflow as jf
from jacobiflow.fixed_point import cuda_graphs
from jacobiflow.models.tarflow import TarFlowBlock
from tests.helpers.fake_device import FakeDevice
from tests.helpers.solver_problems import normal

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("solver", "num", "sweeps", "captures", "replays"),
    [
        (jf.Solver(jf.Sequential()), 5, 192, 8, 192),  # of 4 contexts for two samples, and for one
        (jf.Solver(jf.Window(16)), 1, 20, 2, 16),  # two sweeps of a context without
        (jf.Solver(jf.Window(64)), 1, 12, 0, 0),
        (jf.Solver(jf.Whole()), 1, 12, 0, 0),  # each sweep is of another length
    ],
    ids=lambda value: str(value.partition) if isinstance(value, jf.Solver) else "",
)
def test_graphs_are_captured_for_contexts_that_come_again(
    solver: jf.Solver, num: int, sweeps: int, captures: int, replays: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "_TOKEN_BUCKET", 16)
    monkeypatch.setattr(cuda_graphs, "_SWEEP_BUCKET", 48)
    z, labels = normal(num, 64, 1).float(), torch.arange(num)
    expected = jf.solve(jf.load("digits-p1").blocks[3], z, solver, labels, certify=False, batch_size=2)
    with FakeDevice() as device:
        block = jf.load("digits-p1", device="cuda").blocks[3]
        with device.counting() as counts:
            solution = jf.solve(block, z.to("cuda"), solver, labels.to("cuda"), certify=False, batch_size=2)
        x = solution.x.cpu()
    is_exact = solver.partition == jf.Sequential()
    assert solution.backend == ("graphs" if is_exact else "sweeps") and (solution.obstacle is not None) == is_exact
    torch.testing.assert_close(x, expected.x, rtol=0, atol=2e-3)
    assert solution.sweeps == sweeps  # fronts are looked at every fourth sweep
    assert (counts.captures, counts.operations["replay"]) == (captures, replays)


@pytest.mark.parametrize("solver", [jf.Solver(jf.Sequential()), jf.Solver(jf.Window(16))], ids=["tokens", "sweeps"])
def test_a_failed_capture_warns_and_the_solve_goes_on_without_graphs(
    solver: jf.Solver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block asks for a value, which no capture allows."""
    update_at, z, labels = TarFlowBlock.update_at, normal(1, 64, 1).float(), torch.arange(1)
    expected = jf.solve(jf.load("digits-p1").blocks[3], z, solver, labels, certify=False)

    def read_value(block: Any, x: Tensor, *arguments: Any) -> Tensor:
        x.sum().item()
        return update_at(block, x, *arguments)

    with FakeDevice() as device:
        block = jf.load("digits-p1", device="cuda").blocks[3]
        monkeypatch.setattr(TarFlowBlock, "update_at", read_value)
        with device.counting() as counts, pytest.warns(UserWarning, match="a capture failed: .* when stream is captur"):
            solution = jf.solve(block, z.to("cuda"), solver, labels.to("cuda"), certify=False)
        x = solution.x.cpu()
    assert (counts.captures, counts.operations["replay"]) == (1, 0)
    torch.testing.assert_close(x, expected.x, rtol=0, atol=2e-3)
