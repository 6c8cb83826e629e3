"""How far samples drawn 7 at a time are from those drawn 64 at a time: `python benchmarks/batch_sizes.py`.

Two minutes on two cores. A network rounds a batch of another size otherwise, a solver stops a sweep sooner or later
for it, and "auto" is planned anew. Writes docs/results/batch-sizes.json.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

import jacobiflow as jf
from jacobiflow.evaluation.fidelity import pixel_difference
from jacobiflow.files import write_json
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.measuring import machine

RESULT = Path(__file__).resolve().parent.parent / "docs" / "results" / "batch-sizes.json"
MODEL, NUM, SIZES = "fashion-p2", 128, (7, 64)
STRATEGIES = ("sequential", "jacobi", "auto")


def images(flow: ImageFlow, strategy: str, batch_size: int) -> Tensor:
    """8-bit images, as a folder has them."""
    with tempfile.TemporaryDirectory() as out:
        folder = jf.sample_to_folder(flow, NUM, out, strategy=strategy, batch_size=batch_size, progress=False)
        return torch.cat(list(folder.batches()))


def main() -> None:
    """A row per strategy, at its default tolerance."""
    flow = jf.load(MODEL)
    rows = [
        {"strategy": strategy} | asdict(pixel_difference(*(images(flow, strategy, size) for size in SIZES)))
        for strategy in STRATEGIES
    ]
    write_json(RESULT, {"model": MODEL, "num": NUM, "batch_sizes": SIZES, "machine": machine(), "rows": rows})
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
