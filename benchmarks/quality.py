"""The paper's Tables 3 and 4: rows of strategy and score. `python -m benchmarks.quality MODEL --out FILE.json`.

A row has the Fréchet distance of its samples to real images, their error against the exact images of the same latents,
and the seconds of a batch. All rows are timed first, interleaved. The file is written after each row: the same command
goes on where it was stopped. Needs an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import jacobiflow as jf
from benchmarks.features import KINDS, trained, training_statistics
from benchmarks.peers import GRIDS, PEERS, gs_jacobi_grid
from jacobiflow.baselines import SEQUENTIAL, original_loop
from jacobiflow.data import quantize
from jacobiflow.evaluation import PixelDifference, Statistics, extract, frechet_distance, pixel_difference
from jacobiflow.files import write_json
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.latents import draw_latents
from jacobiflow.measuring import Timing, interleave, machine, paired_error
from jacobiflow.memory import keep_freed_memory
from jacobiflow.strategy import choose, is_auto

ORIGINAL = "Original"
AUTOS = ("auto:1e-1", "auto:1e-2", "auto")
WITHIN = 0.01  # above the original's distance: bold in the paper's tables

Sampler = Callable[[Tensor, Tensor | None], Any]


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: The strategy, or a peer.
        num: Samples.
        distance: Fréchet distance to the real images.
        relative: Its share above the original's distance; negative if nearer.
        max: Largest difference of an entry to the exact images.
        rms: Root-mean-square difference.
        pixels: Differences after rounding to 8 bits.
        resolved: Share of the samples that were solved again token by token.
        seconds: Of one batch, denoising included.
        rate: The original's seconds over these.
    """

    name: str
    num: int
    distance: float
    relative: float
    max: float
    rms: float
    pixels: PixelDifference
    resolved: float
    seconds: Timing
    rate: float

    @property
    def within(self) -> bool:
        """True if the distance is at most 1% above the original's."""
        return self.relative <= WITHIN


def rows_of(result: Mapping[str, Any]) -> list[Row]:
    """The rows of a result file."""
    return [
        Row(**(row | {"pixels": PixelDifference(**row["pixels"]), "seconds": Timing(**row["seconds"])}))
        for row in result["rows"]
    ]


def finalists(rows: Sequence[Row]) -> list[str]:
    """The original, and the fastest within 1% of it among the rows of "auto" and among the others."""
    close = sorted(
        (row for row in rows if row.within and row.name not in (ORIGINAL, SEQUENTIAL)), key=lambda r: -r.rate
    )
    best = [next((row.name for row in close if is_auto(row.name) == planned), None) for planned in (False, True)]
    return [ORIGINAL, *(name for name in best if name is not None)]


@dataclass(frozen=True)
class Experiment:
    """A flow, under its guidance, and how all rows are drawn from it."""

    flow: ImageFlow
    denoise: float
    batch_size: int
    seed: int = 0

    def latents(self, num: int) -> tuple[Tensor, Tensor | None]:
        """Latents and balanced labels of `num` samples."""
        config, device = self.flow.config, self.flow.var.device
        z = draw_latents(num, config.num_tokens, config.token_channels, self.seed)
        return z.to(device), torch.arange(num, device=device) % config.num_classes if config.num_classes else None

    def sampler(self, name: str, report: jf.Report | None = None) -> Sampler:
        """Draws one batch of a row, not denoised: images, or an object with `images`. Rows of "auto" are certified."""
        flow = self.flow
        if name == ORIGINAL:
            loop = original_loop(flow)[1]
            return lambda z, labels: loop(flow, z, labels)
        if name in PEERS:
            return lambda z, labels: PEERS[name](flow, z, labels, **GRIDS[name][0])
        plan = choose(flow, name, self.batch_size, report=report)
        return lambda z, labels: jf.sample(flow, latents=z, labels=labels, strategy=plan, certify=is_auto(name))

    def draw(self, sampler: Sampler, num: int) -> tuple[Tensor, int]:
        """Denoised images of the first `num` latents, and the number of samples that were solved again."""
        z, labels = self.latents(num)
        images: list[Tensor] = []
        resolved = 0
        for start in range(0, num, self.batch_size):
            part = slice(start, start + self.batch_size)
            classes = None if labels is None else labels[part]
            samples = sampler(z[part], classes)
            resolved += getattr(samples, "resolved_sequentially", 0)
            drawn: Tensor = samples if isinstance(samples, Tensor) else samples.images
            images.append(jf.denoise(self.flow, drawn, classes, self.denoise) if self.denoise else drawn)
        return torch.cat(images).cpu(), resolved


def timings(experiment: Experiment, samplers: Mapping[str, Sampler], repeats: int) -> dict[str, Any]:
    """Seconds of one batch of every row, interleaved, and of its denoising."""
    device = experiment.flow.var.device
    z, labels = experiment.latents(experiment.batch_size)
    seconds, results = interleave({name: partial(run, z, labels) for name, run in samplers.items()}, repeats, device)
    denoising = 0.0
    if experiment.denoise:
        run = partial(jf.denoise, experiment.flow, results[SEQUENTIAL].images, labels, experiment.denoise)
        denoising = interleave({"denoise": run}, repeats, device)[0]["denoise"].median
    return {
        "machine": machine(device), "repeats": repeats, "batch_size": experiment.batch_size,
        "denoise_seconds": denoising, "rows": {name: asdict(timing) for name, timing in seconds.items()},
    }  # fmt: skip


def score(
    name: str, images: Tensor, exact: Tensor, resolved: int, base: float | None, real: Statistics, features: nn.Module,
    timed: Mapping[str, Any],
) -> Row:  # fmt: skip
    """The row of `images`; `base` is the original's distance, or None for the original itself."""
    pixels, exact_pixels = (quantize(side.nan_to_num(nan=-1.0)) for side in (images, exact))
    distance = frechet_distance(real, Statistics.of(extract(features, [pixels])))
    error, added = paired_error(images, exact), timed["denoise_seconds"]
    seconds = {row: Timing(**{k: v + added for k, v in timing.items()}) for row, timing in timed["rows"].items()}
    return Row(
        name, len(images), distance, 0.0 if base is None else distance / base - 1, error.max, error.rms,
        pixel_difference(pixels, exact_pixels), resolved / len(images), seconds[name],
        seconds[ORIGINAL].median / seconds[name].median,
    )  # fmt: skip


def compare(
    experiment: Experiment, names: Sequence[str], num: int, final: int | None, real: Statistics, features: nn.Module,
    out: Path, repeats: int = 3, report: jf.Report | None = None, settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Times and scores all rows, then `final` samples of the best ones; returns what the file `out` holds at the end.

    Raises:
        SystemExit: If `out` is of other settings.
    """
    settings = dict(settings or {}) | {
        "seed": experiment.seed, "denoise": experiment.denoise,
        "guidance": None if experiment.flow.guidance is None else asdict(experiment.flow.guidance),
    }  # fmt: skip
    result = json.loads(out.read_text()) if out.exists() else settings | {"timings": None, "rows": [], "final": None}
    if any(result[key] != value for key, value in settings.items()):
        raise SystemExit(f"{out}: of other settings; give another file, or remove it")
    names = list(dict.fromkeys((ORIGINAL, SEQUENTIAL, *names)))
    samplers = {name: experiment.sampler(name, report) for name in names}
    if result["timings"] is None or not set(names) <= result["timings"]["rows"].keys():
        result["timings"] = timings(experiment, samplers, repeats)
        result |= {"rows": [], "final": None}
        write_json(out, result)

    def fill(rows: list[dict[str, Any]], names: Sequence[str], num: int) -> None:
        """Draws and scores the rows that are missing. The original's images are those of the sequential loop."""
        exact = None
        for name in names[len(rows) :]:
            exact = experiment.draw(samplers[SEQUENTIAL], num)[0] if exact is None else exact
            is_exact = name in (ORIGINAL, SEQUENTIAL)
            images, resolved = (exact, 0) if is_exact else experiment.draw(samplers[name], num)
            base = rows[0]["distance"] if rows else None
            row = score(name, images, exact, resolved, base, real, features, result["timings"])
            rows.append(asdict(row))
            print(f"{name:40s} {row.distance:.4f} {row.relative:+.2%} {row.max:.1e} {row.rate:.2f}x", flush=True)
            write_json(out, result)

    fill(result["rows"], names, num)
    if final is not None:
        result["final"] = result["final"] or []
        fill(result["final"], finalists(rows_of(result)), final)
    return result


def main() -> None:
    """Compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a bundled name, or a model folder")
    parser.add_argument("--out", type=Path, required=True, help="file of the rows (JSON)")
    parser.add_argument(
        "--strategy", action="append", help="a row, or a peer's name; default: the paper's grid, the peers, and auto"
    )
    parser.add_argument("--num", type=int, default=2000, help="samples a row")
    parser.add_argument("--final", type=int, help="then so many of Original and the best two rows")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3, help="rounds of timing")
    parser.add_argument("--features", default="fashion", choices=list(KINDS))
    options = parser.parse_args()
    flow = jf.load(options.model)
    recommended = flow.recommended
    flow = flow.guided(recommended.guidance)
    path = jf.find_report(flow)
    report = None if path is None else jf.Report.load(path)
    compare(
        Experiment(flow, recommended.denoise, options.batch_size),
        options.strategy or [*gs_jacobi_grid(report, short=True), *PEERS, *AUTOS],
        options.num, options.final, training_statistics(options.features), trained(options.features), options.out,
        options.repeats, report,
        {"model": options.model, "distance": f"{options.features}-FID", "against": KINDS[options.features].description},
    )  # fmt: skip


if __name__ == "__main__":
    keep_freed_memory()  # for all rows
    main()
