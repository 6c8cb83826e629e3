"""What a GPU would be asked, counted without one: `python benchmarks/gpu_counts.py`.

Kernels, copies, read-backs and bytes of `fake_device.py`, for a TarFlow block of 8 layers: each further
token of the loop, each further sweep, the memory of samples that wait for a slot, and that of denoising at 128x128.

Writes docs/results/gpu-counts.json; `--key before`, with the package of commit e74c512, wrote what is there as before.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fake_device import Counts, FakeDevice
from paper_shapes import Launched

import jacobiflow as jf
from jacobiflow.denoising import denoised
from jacobiflow.files import write_json
from jacobiflow.guidance import guided
from jacobiflow.latents import draw_latents
from jacobiflow.strategy.plan import rounding_floor

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "results" / "gpu-counts.json"
LOOP = "a token of the loop"
SOLVERS: dict[str, Callable[[int], jf.Solver]] = {
    LOOP: lambda tokens: jf.Solver(jf.Sequential()),
    "a sweep of a segment, 8 sweeps each": lambda tokens: jf.Solver(jf.Segments(tokens // 8), stopping=jf.MaxSweeps(8)),
    "a sweep of a window": lambda tokens: jf.Solver(jf.Window(4), stopping=jf.Tolerance(1e-30)),
}
GUIDANCES = {"plain": None, "guided": jf.Guidance(1.0)}


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


def counted(num: int) -> dict[str, Any]:
    """All of it, by what and then by guidance; `num` images are denoised."""
    found: dict[str, Any] = {
        name: {title: a_sweep(solver, guidance) for title, guidance in GUIDANCES.items()}
        for name, solver in SOLVERS.items()
    }
    found[f"{LOOP}, launched one by one"] = {
        title: a_sweep(SOLVERS[LOOP], guidance, launched=True) for title, guidance in GUIDANCES.items()
    }
    found["peak of waiting samples"] = {title: waiting(guidance) for title, guidance in GUIDANCES.items()}
    found["denoising"] = {"images": num, "gib": denoising(num)}
    return found


def in_bfloat16(num: int = 16) -> dict[str, Any]:
    """Network calls of `fashion-p2` in both precisions, to the tolerance that rounding to bfloat16 allows."""
    low, exact = (jf.load("fashion-p2", dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    config = low.config
    z = draw_latents(num, config.num_tokens, config.token_channels, 0)
    tolerance, labels = rounding_floor(low, z, None), torch.arange(num) % config.num_classes
    return {
        "samples": num,
        "tolerance": tolerance,
        "calls": {
            way: {
                str(flow.var.dtype).removeprefix("torch."): jf.sample(
                    flow, latents=z, labels=labels, strategy=way, tolerance=tolerance
                ).network_calls
                for flow in (exact, low)
            }
            for way in ("jacobi", "window:32", "window:64")
        },
    }


def main() -> None:
    """Count, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--key", default="after", choices=("before", "after"))
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    found = json.loads(given.out.read_text()) if given.out.exists() else {}
    head = {"command": "python benchmarks/gpu_counts.py", "torch": torch.__version__}
    write_json(given.out, found | head | {given.key: counted(64), "bfloat16": in_bfloat16()})


if __name__ == "__main__":
    main()
