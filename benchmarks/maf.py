"""Repeats the paper's experiment on another flow, section 4.4 and Table 5: `python -m benchmarks.maf`.

Writes docs/results/maf.json, which fills docs/paper.md, in half an hour on two cores that are otherwise idle. A MAF
of 5 blocks is trained on Fashion-MNIST, and the latents of 50,000 images are inverted. The "For" loop takes hours
for all: it is timed on the first batches, and the time for all is extrapolated from these.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

import jacobiflow as jf
from benchmarks.common import RESULTS, Json, complete, parser, without_native
from benchmarks.sources import ROOT
from jacobiflow.comparison.baselines import original_sampler
from jacobiflow.data import Noise, load_images
from jacobiflow.data.noise import keyed_generator
from jacobiflow.models.memory import keep_freed_memory

FOLDER = ROOT / "out" / "maf-fashion-mnist"
TRAINING = "--flow maf --channels 512 --layers 2 --blocks 5 --unconditional --batch-size 128 --steps 3000"
IMAGES, BATCH, LOOP_BATCHES = 50_000, 500, 2
TOLERANCE = 1e-3
FOR_LOOP = "For loop"

Inverse = Callable[[Tensor], Tensor]


def trained() -> jf.MAF:
    """The MAF; trains it first if there is none."""
    line = f"--images fashion-mnist {TRAINING} --sample-every 1000 --out {FOLDER}".split()
    subprocess.run([sys.executable, "-m", "jacobiflow", "train", *line], check=True)
    return jf.MAF.from_pretrained(FOLDER).requires_grad_(False)


def inverses_of(flow: jf.MAF) -> dict[str, Inverse]:
    """Inverses from latents to pixels (B, D): the table's loop and sweeps, and to a tolerance."""

    def inverse(strategy: str | jf.Strategy, z: Tensor, certify: bool = False) -> Tensor:
        return jf.decode(flow, z, strategy=strategy, certify=certify).flatten(1)

    def sweeps(solver: jf.Solver, certify: bool = False) -> Inverse:
        return partial(inverse, jf.Strategy.uniform(solver, flow.config.num_blocks), certify=certify)

    inverses: dict[str, Inverse] = {FOR_LOOP: lambda z: original_sampler(flow)[1](flow, z, None).flatten(1)}
    for count in (10, 20, 30):
        inverses[f"{count} sweeps"] = sweeps(jf.Solver(jf.Whole(), stopping=jf.MaxSweeps(count)))
    whole, window = (jf.Solver(part, stopping=jf.Tolerance(TOLERANCE)) for part in (jf.Whole(), jf.Window(64)))
    loop = partial(inverse, "sequential")
    return inverses | {
        f"sweeps to {TOLERANCE:g}": sweeps(whole),
        f"window of 64 to {TOLERANCE:g}": sweeps(window),
        f"window of 64 to {TOLERANCE:g}, certified": sweeps(window, certify=True),
        "sequential, cached, in PyTorch": without_native()(loop),
        "sequential, cached": loop,
    }


def measure(inverse: Inverse, images: Tensor, latents: Tensor, most: int | None) -> Json:
    """Seconds of the inverse of `most` batches or all, and the mean absolute error of a pixel in [0, 1]."""
    batches = list(zip(latents.split(BATCH), images.flatten(1).split(BATCH), strict=True))
    total = len(batches)
    batches = batches[:most]
    errors, seconds = [], []
    inverse(latents[:8])  # the first call is slower
    for z, x in batches:
        started = perf_counter()
        pixels = inverse(z)
        seconds.append(perf_counter() - started)
        errors.append((pixels - x).abs() / 2)
    error = torch.cat(errors)
    return {
        "batches": len(batches), "seconds": sum(seconds),
        "seconds_of_all": sum(seconds) / len(batches) * total,
        "spread": max(seconds) / min(seconds), "mae": float(error.mean()), "max_error": float(error.max()),
    }  # fmt: skip


def main() -> None:
    parser(__doc__).parse_args()
    flow = trained()
    clean, _ = load_images("fashion-mnist", flow.config.image_size, 1).batch(slice(0, IMAGES))
    noise = Noise()
    numbers = [noise.draw(batch.shape, keyed_generator(0, 3, k)) for k, batch in enumerate(clean.split(BATCH))]
    images = noise.add(clean, torch.cat(numbers))
    with torch.no_grad():
        latents = torch.cat([flow.encode(batch)[0] for batch in images.split(BATCH)])
        inverses = inverses_of(flow)
        keys = [{"method": name, "images": len(images), "batch_size": BATCH} for name in inverses]

        def measure_method(key: Json) -> Json:
            most = LOOP_BATCHES if key["method"] == FOR_LOOP else None
            return measure(inverses[key["method"]], images, latents, most)

        complete(RESULTS / "maf.json", keys, measure_method)


if __name__ == "__main__":
    keep_freed_memory()
    main()
