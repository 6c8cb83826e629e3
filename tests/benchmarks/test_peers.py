"""Samplers of other papers, against their rules written over the oracle, and the settings of the GS-Jacobi paper."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import jacobiflow as jf
from benchmarks.lib.peers import GRIDS, PEERS, gs_jacobi_grid
from tests.helpers import oracle
from tests.helpers.invented import make_report
from tests.helpers.problems import latents, make_flow

LABELS = torch.tensor([0, 2, -1])
GUIDANCE, GUIDE = jf.Guidance(0.6, attn_temperature=1.5), oracle.Guide(0.6, True, "both", 1.5)

pytestmark = pytest.mark.usefixtures("one_thread")


def reference_whole(g: oracle.Map, z: Tensor, threshold: float) -> tuple[Tensor, int]:
    """Sweeps of all tokens from 0: the answer and the number of sweeps."""
    x, sweeps, change = torch.zeros_like(z), 0, math.inf
    while change >= threshold and sweeps < z.shape[1]:
        new = g(x)
        change, x, sweeps = (new - x).abs().max().item(), new, sweeps + 1
    return x, sweeps


def reference_runs(
    g: oracle.Map, z: Tensor, run_length: int, threshold: float, max_sweeps: int, fresh_keys: bool
) -> tuple[Tensor, int]:
    """Runs of tokens; `read` has each token as the network last read it."""
    x, read, calls = z.clone(), z.clone(), 0
    for start in range(0, z.shape[1], run_length):
        stop, sweeps, change = min(start + run_length, z.shape[1]), 0, math.inf
        while change >= threshold and sweeps < max_sweeps:
            read[:, max(start - 1, 0) :] = x[:, max(start - 1, 0) :]
            new = g(read)[:, start:stop]
            change = (((new - x[:, start:stop]) ** 2).mean() / (new**2).mean()).item()
            x[:, start:stop] = new
            sweeps += 1
        calls += sweeps
        if fresh_keys and stop < z.shape[1]:
            read[:, start:stop] = x[:, start:stop]
    return x, calls


def expected(flow: jf.TarFlow, z: Tensor, solve: Callable[[int, oracle.Map, Tensor], Any]) -> tuple[Tensor, int]:
    """Images and network calls of solving every block, last first."""
    reference, calls = oracle.Oracle(flow), 0
    x = z * reference.var.sqrt()
    for i in reversed(range(reference.num_blocks)):
        z_of_block = reference.flip(i, x)

        def g(x: Tensor, i: int = i, z_of_block: Tensor = z_of_block) -> Tensor:
            return reference.g(i, x, z_of_block, LABELS, GUIDE)

        x, more_calls = solve(i, g, z_of_block)
        x, calls = reference.flip(i, x), calls + more_calls
    return reference.images(x), calls


def test_selective_jacobi_is_its_rule() -> None:
    threshold, flow = 0.5, make_flow(num_classes=3, num_blocks=3)
    z, length = latents(flow, 3), flow.config.num_tokens

    def solve(i: int, g: oracle.Map, z_of_block: Tensor) -> tuple[Tensor, int]:
        if i == flow.config.num_blocks - 1:
            return oracle.sequential(g, z_of_block), length
        return reference_whole(g, z_of_block, threshold)

    images, calls = expected(flow, z, solve)
    out = PEERS["Selective Jacobi Decoding"](flow.guided(GUIDANCE), z, LABELS, threshold=threshold)
    torch.testing.assert_close(out.images, images, rtol=0, atol=1e-9)
    assert out.network_calls == calls
    assert length < calls <= 3 * length


@pytest.mark.parametrize("fresh_keys", [False, True])
@pytest.mark.parametrize(("run_length", "threshold", "max_sweeps"), [(16, 1e-3, 32), (5, 1e-2, 32), (6, 1e-9, 2)])
def test_starflow_is_its_rule(run_length: int, threshold: float, max_sweeps: int, fresh_keys: bool) -> None:
    flow, settings = make_flow(num_classes=3), {"run_length": run_length, "threshold": threshold}
    z, settings = latents(flow, 3), settings | {"max_sweeps": max_sweeps, "fresh_keys": fresh_keys}
    images, calls = expected(flow, z, lambda i, g, z_of_block: reference_runs(g, z_of_block, **settings))
    out = PEERS["STARFlow"](flow.guided(GUIDANCE), z, LABELS, **settings)
    torch.testing.assert_close(out.images, images, rtol=0, atol=1e-9)
    assert out.network_calls == calls


AFHQ = (51.85, 51.45, 66.76, 64.98, 73.77, 84.05, 76.64, 348.51)  # CRM, Table 2 of the paper
TABLE_4A = ("Jacobi-30", "Jacobi-60", "[7-1024-1-10]", "[7-1-256-10]", "[7-4-64-10]", "[7-8-32-10]")


def test_settings_are_those_of_the_papers() -> None:
    assert GRIDS["Selective Jacobi Decoding"][0] == {"threshold": 0.5}
    published = {"run_length": 16, "threshold": 1e-3, "max_sweeps": 32}
    assert GRIDS["STARFlow"][:2] == [{**published, "fresh_keys": fresh} for fresh in (False, True)]
    assert set(TABLE_4A) <= set(gs_jacobi_grid(make_report(AFHQ, num_tokens=1024)))
