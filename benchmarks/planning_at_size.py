"""How long calibrating and planning would take for the paper's 128x128 model on a GPU, by counting passes:
`python benchmarks/planning_at_size.py`, half an hour on two cores.

`emoji-p2` is calibrated and planned in earnest, but a clock goes by the products that its network computes: for every
matrix product it advances by the seconds that the product takes in proportion, were a pass over a block that of
`img128cond` at half an A100's peak rate with TF32. A product of few rows takes no less than its weights take to be
read. Sweeps are as many as `emoji-p2` needs, whose T is a quarter. What is not counted: launches, waits, and reading
images.

A calibration's passes are linear in the images, and in the traced samples beyond those that are tuned with; the norm
of the error matrix is of even fewer. Small ones tell how many of each.
Writes docs/results/planning-at-size.json.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import jacobiflow as jf
from jacobiflow import native
from jacobiflow.calibration.tune import SAMPLES
from jacobiflow.data import Noise, bundled_emoji, noisy_images
from jacobiflow.files import write_json
from jacobiflow.flows.image_flow import ImageFlow

OUT = Path(__file__).resolve().parent.parent / "docs" / "results" / "planning-at-size.json"
SMALL, LARGE = "emoji-p2", "img128cond"
RATE, BANDWIDTH = 0.5 * 156e12, 0.5 * 2.0e12  # half of an A100's TF32 products and bytes a second
IMAGES, TRACED = 512, 32  # as jacobiflow calibrate has it
FEW = 2 * SAMPLES, SAMPLES  # of both, in a small calibration
MORE = 192, 8  # that others have in addition: many images, since other images mean other traced samples
BATCHES = (1, 16, 64)


def flops(flow: ImageFlow) -> int:
    """Operations of a pass over a block, of one sample."""
    config = flow.config
    x = torch.zeros(1, config.num_tokens, config.token_channels, device=flow.var.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        flow.blocks[0].affine_whole(x, torch.zeros(1, dtype=torch.long, device=x.device))
    return counter.get_total_flops()


class AtSize(TorchDispatchMode):
    """A clock that goes by the products of a small model, as if they were those of a large one."""

    def __init__(self, small: ImageFlow, large: ImageFlow) -> None:
        super().__init__()
        self.now = 0.0
        self.passes = 0.0  # of one sample over a block
        self._flops = flops(small)
        self.pass_seconds = flops(large) / RATE
        weights = sum(p.nbytes for p in large.blocks[0].parameters())
        own = sum(p.numel() for p in small.blocks[0].parameters())
        # The loop of the small model takes fewer steps, and each stands for several.
        self._weight_seconds = weights / BANDWIDTH / own * large.config.num_tokens / small.config.num_tokens

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, and let the time pass."""
        kwargs = kwargs or {}
        count = flop_registry.get(func._overloadpacket)
        if count is None:
            with self:  # linear layers, where no gradients are kept, are made of products
                parts = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if parts is NotImplemented else parts
        out = func(*args, **kwargs)
        share = count(*args, **kwargs, out_val=out) / self._flops
        self.passes += share
        read = args[-1].numel() if args[-1].ndim == 2 else 0
        self.now += max(share * self.pass_seconds, read * self._weight_seconds)
        return out

    def __call__(self) -> float:
        """In place of `time.perf_counter`."""
        return self.now


def images(flow: ImageFlow, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images of the package, and their labels."""
    data, index = bundled_emoji(), torch.arange(num)
    assert data.labels is not None
    return noisy_images(data, index, Noise("gaussian", flow.config.noise_std)), data.labels[index]


def calibrated(flow: ImageFlow, clock: AtSize, num: int, traced: int, chord: bool = False) -> tuple[jf.Report, float]:
    """A report, and the passes that it takes."""
    pixels, labels = images(flow, num)
    before = clock.passes
    with clock:
        report = jf.calibrate(flow, pixels, labels, traced=traced, chord=chord)
    return report, clock.passes - before


def planned(flow: ImageFlow, clock: AtSize, report: jf.Report, batch: int) -> dict[str, Any]:
    """A plan, and the seconds that it takes."""
    began, before = clock.now, clock.passes
    with clock, mock.patch.object(time, "perf_counter", clock):
        plan = jf.plan(flow, report, batch)
    assert plan.prediction is not None
    return {
        "batch": batch, "seconds": clock.now - began, "passes": clock.passes - before,
        "sampling": plan.prediction.seconds, "sequential": plan.prediction.sequential_seconds,
    }  # fmt: skip


def main() -> None:
    """Count, scale, write."""
    os.environ[native.SWITCH] = "0"
    small = jf.load(SMALL)
    with torch.device("meta"):
        large = jf.TarFlow(jf.PRESETS[LARGE].config).requires_grad_(False)
    clock = AtSize(small, large)
    report, base = calibrated(small, clock, *FEW, chord=True)
    few = calibrated(small, clock, *FEW)[1]
    per_image = (calibrated(small, clock, FEW[0] + MORE[0], FEW[1])[1] - few) / MORE[0]
    per_traced = (calibrated(small, clock, FEW[0], FEW[1] + MORE[1])[1] - few) / MORE[1]
    blocks = large.config.num_blocks / small.config.num_blocks
    passes = blocks * (base + per_image * (IMAGES - FEW[0]) + per_traced * (TRACED - FEW[1]))
    found = {
        "command": "python benchmarks/planning_at_size.py", "torch": torch.__version__, "rate": RATE,
        "bandwidth": BANDWIDTH, "pass_seconds": clock.pass_seconds,
        "calibrate": {
            "images": IMAGES, "traced": TRACED, "per_image": blocks * per_image, "per_traced": blocks * per_traced,
            "passes": passes, "seconds": passes * clock.pass_seconds,
        },
        "plan": [planned(small, clock, report, batch) for batch in BATCHES],
    }  # fmt: skip
    write_json(OUT, found)


if __name__ == "__main__":
    main()
