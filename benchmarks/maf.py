"""The paper's experiment on another flow (section 4.4, Table 5): `python -m benchmarks.maf`.

Writes docs/results/maf.json. A MAF of 5 blocks is trained on Fashion-MNIST, 50,000 images are encoded, and their
latents are inverted: by the "For" loop of one full pass per pixel, by sweeps, and to a tolerance. The loop takes hours
for all images: it is timed on the first batches, and the time for all is extrapolated from these. The loop token by
token is timed in native code and in PyTorch.
Training takes ten minutes on two cores and goes on where it stopped; then the script needs an otherwise idle machine
and a quarter of an hour. With `--images FOLDER` it reads MNIST's IDX files instead, and all that it makes stays in
out/maf-FOLDER.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

import jacobiflow as jf
from benchmarks.common import RESULTS, ROOT, in_pytorch
from jacobiflow.baselines import full_passes_sample
from jacobiflow.data import Noise, load_images
from jacobiflow.data.noise import add_noise, keyed_generator
from jacobiflow.files import write_json
from jacobiflow.measuring import machine
from jacobiflow.memory import keep_freed_memory

RESULT, ROWS = RESULTS / "maf.json", "rows.json"
FASHION = "fashion-mnist"
TRAINING = "--flow maf --channels 512 --layers 2 --blocks 5 --unconditional --batch-size 128 --steps 3000"
IMAGES, BATCH, LOOP_BATCHES = 50_000, 500, 2
TOLERANCE = 1e-3

Inverse = Callable[[Tensor], Tensor]


def trained(images: str, folder: Path) -> jf.MAF:
    """The MAF; trains it first if there is none."""
    line = [*f"--images {images} {TRAINING} --sample-every 1000".split(), "--out", str(folder)]
    subprocess.run([sys.executable, "-m", "jacobiflow", "train", *line], check=True)
    return jf.MAF.from_pretrained(folder).requires_grad_(False)


def invert(flow: jf.MAF, strategy: jf.Strategy | str, certify: bool, z: Tensor) -> Tensor:
    """Images (B, D) from latents by a strategy of the library."""
    return jf.decode(flow, z, strategy=strategy, certify=certify).images.flatten(1)


def strategies(flow: jf.MAF) -> dict[str, Inverse]:
    """Inverses of all images by name: the table's sweeps, and to a tolerance."""
    count = flow.config.num_blocks
    solvers: dict[str, Inverse] = {}
    for sweeps in (10, 20, 30):
        solver = jf.Solver(jf.Whole(), stopping=jf.MaxSweeps(sweeps))
        solvers[f"{sweeps} sweeps"] = partial(invert, flow, jf.Strategy.uniform(solver, count), False)
    whole = jf.Solver(jf.Whole(), stopping=jf.Tolerance(TOLERANCE))
    solvers[f"sweeps to {TOLERANCE:g}"] = partial(invert, flow, jf.Strategy.uniform(whole, count), False)
    window = jf.Strategy.uniform(jf.Solver(jf.Window(64), stopping=jf.Tolerance(TOLERANCE)), count)
    solvers[f"window of 64 to {TOLERANCE:g}"] = partial(invert, flow, window, False)
    solvers[f"window of 64 to {TOLERANCE:g}, certified"] = partial(invert, flow, window, True)
    loop = partial(invert, flow, "sequential", False)
    return solvers | {"sequential, cached, in PyTorch": in_pytorch(loop), "sequential, cached": loop}


def batches(images: Tensor) -> Iterator[Tensor]:
    """Dequantised images in [-1, 1), batch by batch."""
    for k, start in enumerate(range(0, len(images), BATCH)):
        yield add_noise(images[start : start + BATCH], Noise("uniform"), keyed_generator(0, 3, k))


def timed(
    folder: Path, name: str, inverse: Inverse, latents: list[Tensor], images: list[Tensor], total: int
) -> dict[str, Any]:
    """Seconds for `total` batches, of which `latents` are timed, and the mean absolute error of a pixel in [0, 1].

    A row that an interrupted run has measured is kept in the folder's rows.json.
    """
    path = folder / ROWS
    rows = json.loads(path.read_text()) if path.exists() else {}
    if name in rows:
        return rows[name]
    errors, seconds = [], []
    inverse(latents[0][:8])  # the first call is slower
    for z, x in track(zip(latents, images, strict=True), name, len(latents), transient=True):
        started = perf_counter()
        answer = inverse(z)
        seconds.append(perf_counter() - started)
        errors.append((answer - x).abs() / 2)
    error = torch.cat(errors)
    row = {
        "method": name, "batches": len(latents), "seconds": sum(seconds),
        "seconds_of_all": sum(seconds) / len(latents) * total,
        "spread": max(seconds) / min(seconds), "mae": float(error.mean()), "max_error": float(error.max()),
    }  # fmt: skip
    print(f"{name}: {row['seconds_of_all']:.0f} s, MAE {row['mae']:.1e}", file=sys.stderr)
    write_json(path, rows | {name: row})
    return row


def ours(flow: jf.MAF, images: Tensor, folder: Path) -> list[dict[str, Any]]:
    """The rows of Table 5."""
    exact = list(batches(images))
    latents = [flow.encode(x)[0] for x in exact]
    pixels = [x.flatten(1) for x in exact]
    total = len(latents)

    def loop(z: Tensor) -> Tensor:
        return full_passes_sample(flow, z).flatten(1)

    first = timed(folder, "For loop", loop, latents[:LOOP_BATCHES], pixels[:LOOP_BATCHES], total)
    return [first, *(timed(folder, name, f, latents, pixels, total) for name, f in strategies(flow).items())]


def main() -> None:
    """Train, encode, invert, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default=FASHION, help="fashion-mnist, or a folder of IDX files")
    images = parser.parse_args().images
    folder = ROOT / "out" / f"maf-{Path(images).name}"  # a model, and rows, of these images
    flow = trained(images, folder)
    test_images, _ = load_images(images, flow.config.image_size, 1).batch(slice(0, IMAGES))
    with torch.no_grad():
        rows = ours(flow, test_images, folder)
    write_json(RESULT if images == FASHION else folder / RESULT.name, {
        "command": f"python -m benchmarks.maf --images {images}", "images": len(test_images), "batch_size": BATCH,
        "training": TRAINING, "tolerance": TOLERANCE, "machine": machine(), "rows": rows,
    })  # fmt: skip
    (folder / ROWS).unlink()


if __name__ == "__main__":
    keep_freed_memory()
    main()
