"""Repeats the paper's experiment on another flow, section 4.4 and Table 5: `python -m benchmarks.maf`.

Writes docs/results/maf.json, which fills docs/paper.md, in half an hour on two cores that are otherwise idle. A MAF
of 5 blocks is trained on Fashion-MNIST, and the latents of 50,000 images are inverted. The "For" loop takes hours
for all: it is timed on the first batches, and the time for all is extrapolated from these.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor

import jacobiflow as jf
from benchmarks import ROOT
from benchmarks.lib.process import without_native
from benchmarks.lib.results import Json, measure_files
from jacobiflow.comparison.baselines import original_sampler
from jacobiflow.data import Noise, load_images
from jacobiflow.data.noise import keyed_generator
from jacobiflow.utils.timing import time_call

FOLDER = ROOT / "out" / "maf-fashion-mnist"
TRAINING = "--flow maf --width 512 --layers 2 --blocks 5 --unconditional --batch-size 128 --steps 3000"
IMAGES, BATCH, LOOP_BATCHES = 50_000, 500, 2
TOLERANCE = 1e-3
FOR_LOOP = "For loop"
Inverse = Callable[[Tensor], Tensor]


def trained() -> jf.MAF:
    """The MAF; trains it first if there is none."""
    from jacobiflow.cli import train  # noqa: F401  # It runs in another process, and the digest follows imports.

    line = f"--images fashion-mnist {TRAINING} --sample-every 1000 --out {FOLDER}".split()
    subprocess.run([sys.executable, "-m", "jacobiflow", "train", *line], check=True)
    return jf.MAF.from_pretrained(FOLDER).requires_grad_(False)


def by_sweeps(solver: jf.Solver, tolerance: float | None, certify: bool = False) -> Callable[[jf.MAF], Inverse]:
    def inverse_of(flow: jf.MAF) -> Inverse:
        plan = jf.Strategy.uniform(solver, flow.config.num_blocks, tolerance)
        return partial(jf.decode, flow, strategy=plan, certify=certify)

    return inverse_of


def by_for_loop(flow: jf.MAF) -> Inverse:
    original = original_sampler(flow)[1]
    return lambda z: original(flow, z, None)


def by_cached_loop(flow: jf.MAF) -> Inverse:
    return partial(jf.decode, flow, strategy="sequential", certify=False)


# The table's loop and sweeps, and inverses to a tolerance. Each makes the inverse of a flow, from latents to images.
METHODS: dict[str, Callable[[jf.MAF], Inverse]] = {
    FOR_LOOP: by_for_loop,
    **{f"{count} sweeps": by_sweeps(jf.Solver(stopping=jf.Stopping(count)), None) for count in (10, 20, 30)},
    f"sweeps to {TOLERANCE:g}": by_sweeps(jf.Solver(), TOLERANCE),
    f"window of 64 to {TOLERANCE:g}": by_sweeps(jf.Solver(jf.Window(64)), TOLERANCE),
    f"window of 64 to {TOLERANCE:g}, certified": by_sweeps(jf.Solver(jf.Window(64)), TOLERANCE, certify=True),
    "sequential, cached, in PyTorch": lambda flow: without_native()(by_cached_loop(flow)),
    "sequential, cached": by_cached_loop,
}


@cache
def prepared() -> tuple[jf.MAF, list[Tensor], list[Tensor]]:
    """The trained flow, batches of dequantised images, and their latents."""
    flow, noise = trained(), Noise()
    clean, _ = load_images("fashion-mnist", flow.config.image_size, 1).batch(slice(0, IMAGES))
    batches = enumerate(clean.split(BATCH))
    images = [noise.add(batch, noise.draw(batch.shape, keyed_generator(0, 3, k))) for k, batch in batches]
    return flow, images, [flow.encode(batch)[0] for batch in images]


def keys() -> Iterator[Json]:
    """The methods; nothing is trained before the machine of the result file is checked."""
    yield from ({"method": name, "images": IMAGES, "batch_size": BATCH} for name in METHODS)


@torch.no_grad()
def measure(key: Json) -> Json:
    """Seconds of the inverse of the first or all batches, and the mean absolute error of a pixel in [0, 1]."""
    flow, images, latents = prepared()
    inverse, count = METHODS[key["method"]](flow), LOOP_BATCHES if key["method"] == FOR_LOOP else len(images)
    inverse(latents[0][:8])  # The first call is slower.
    timed = [time_call(partial(inverse, z), torch.device("cpu")) for z in latents[:count]]
    seconds = [elapsed for elapsed, _ in timed]
    error = torch.cat([(x - image).abs() / 2 for (_, x), image in zip(timed, images, strict=False)])
    return {
        "batches": count, "seconds": sum(seconds), "seconds_of_all": sum(seconds) / count * len(images),
        "spread": max(seconds) / min(seconds), "mae": float(error.mean()), "max_error": float(error.max()),
    }  # fmt: skip


def main() -> None:
    measure_files(__doc__, {"maf": [(keys(), measure)]})


if __name__ == "__main__":
    main()
