"""Counts of what a GPU is asked, on the fake device: for each further token or sweep of a block of 8 layers, the memory
of samples that wait for a slot, and that of denoising at 128x128.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import jacobiflow as jf
from jacobiflow.denoising import denoised
from jacobiflow.flows.guidance import guided
from jacobiflow.latents import draw_latents
from tests.helpers.fake_device import Counts, FakeDevice

LOOP = "a token of the loop"
SOLVERS: dict[str, Callable[[int], jf.Solver]] = {
    LOOP: lambda tokens: jf.Solver(jf.Sequential()),
    "a sweep of a segment, 8 sweeps each": lambda tokens: jf.Solver(jf.Segments(tokens // 8), stopping=jf.MaxSweeps(8)),
    "a sweep of a window": lambda tokens: jf.Solver(jf.Window(4), stopping=jf.Tolerance(1e-30)),
}
GUIDANCES = {"plain": None, "guided": jf.Guidance(1.0)}


@dataclass(frozen=True)
class Launched:
    """A block of which a solver knows only how to evaluate it, so that every kernel is launched by itself."""

    block: jf.AffineBlock
    inference_safe = True

    def init_cache(self, z: Tensor, context: Tensor | None = None) -> Any:
        return self.block.init_cache(z, context)

    def update(self, x: Tensor, z: Tensor, start: int, stop: int, cache: Any) -> Tensor:
        return self.block.update(x, z, start, stop, cache)


def solve(
    side: int, solver: jf.Solver, guidance: jf.Guidance | None, num: int = 3, slots: int | None = None,
    launched: bool = False,
) -> tuple[int, Counts]:  # fmt: skip
    """The sweeps of a solve over (side/2)^2 tokens, and what it asks."""
    config = jf.TarFlowConfig(3, side, 2, channels=32, num_blocks=1, layers_per_block=8, num_classes=5, head_dim=16)
    torch.manual_seed(0)
    flow = jf.TarFlow(config).requires_grad_(False)
    flow.blocks[0].proj_out.weight.normal_(std=0.02)
    with FakeDevice() as device:
        block: Any = guided(flow.to("cuda").blocks[0], guidance)
        z = draw_latents(num, config.num_tokens, config.token_channels, 0).to("cuda")
        labels = torch.arange(num, device="cuda") % 5
        with device.counting() as counts:
            found = jf.solve(Launched(block) if launched else block, z, solver, labels, slots)
    return found.sweeps, counts


def a_sweep(solver: Callable[[int], jf.Solver], guidance: jf.Guidance | None, launched: bool = False) -> dict[str, Any]:
    """What each further sweep asks."""
    (few, before), (many, after) = (solve(side, solver(side**2 // 4), guidance, launched=launched) for side in (8, 16))

    def each(total: Callable[[Counts], int]) -> float:
        return (total(after) - total(before)) / (many - few)

    return {
        "operations": each(lambda counts: counts.operations.total()),
        "read_backs": each(lambda counts: counts.read_backs),
        "copies": each(lambda counts: counts.to_device),
        "explicit_masks": each(lambda counts: counts.attention["explicit"]),
    }


def waiting(guidance: jf.Guidance | None) -> float:
    """The peak of 40 samples in 8 slots over that of 8 samples."""
    solver = jf.Solver(jf.Window(8), stopping=jf.Tolerance(1e-6))
    (_, alone), (_, counts) = (solve(16, solver, guidance, num, 8) for num in (8, 40))
    return counts.peak / alone.peak


def denoising(num: int) -> float:
    """GiB of denoising images of 128x128, beside the weights; nothing is computed."""
    with torch.device("meta"):
        flow = jf.TarFlow(jf.PRESETS["img128cond"].config).requires_grad_(False)
    with FakeDevice(meta=True) as device:
        flow, pixels = flow.to("cuda"), torch.empty(num, 3, 128, 128, device="cuda")
        with device.counting() as counts:
            denoised(flow, pixels, None, 1.0, num)
    return counts.peak / 2**30
