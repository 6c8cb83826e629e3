"""Measures quality and time of strategies, the paper's Tables 3 and 4: `python -m benchmarks.quality MODEL --out FILE`.

A row has the Fréchet distance of its samples to real images, their error against the exact images of the same
latents, and the seconds of a batch. All rows are timed first, interleaved, on an otherwise idle machine. Writes
FILE, in hours for the paper's grid and 2,000 samples. `make evaluation` writes those that fill docs/paper.md and
docs/evaluation.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import jacobiflow as jf
from benchmarks.common import Json, latents, origin, parser, read, to_json
from benchmarks.features import KINDS, trained, training_statistics
from benchmarks.peers import GRIDS, PEERS, gs_jacobi_grid
from jacobiflow.comparison.baselines import SEQUENTIAL, original_sampler
from jacobiflow.data import quantize
from jacobiflow.evaluation import FeatureStatistics, extract_features, frechet_distance, paired_error, pixel_difference
from jacobiflow.models.flow import Flow
from jacobiflow.models.memory import keep_freed_memory
from jacobiflow.planner import choose, is_auto
from jacobiflow.utils.files import write_json
from jacobiflow.utils.timing import time_interleaved

ORIGINAL = "Original"
AUTOS = ("auto:1e-1", "auto:1e-2", "auto")
WITHIN = 0.01  # above the original's distance: bold in the paper's tables

Sampler = Callable[[Tensor, Tensor], Any]


def finalists(rows: Sequence[Json]) -> list[str]:
    """The original, and the fastest row within 1% of it, both of "auto" and of all others."""
    close = [row for row in rows if row["relative"] <= WITHIN and row["name"] not in (ORIGINAL, SEQUENTIAL)]
    names = [row["name"] for row in sorted(close, key=lambda row: -row["rate"])]
    best = [next((name for name in names if is_auto(name) == planned), None) for planned in (False, True)]
    return [ORIGINAL, *filter(None, best)]


class Experiment(NamedTuple):
    """A flow under its guidance, the size of its batches, and the measure of its samples."""

    flow: Flow
    denoise: float
    batch_size: int
    real: FeatureStatistics
    features: nn.Module
    report: jf.CalibrationReport | None = None

    def sampler(self, name: str) -> Sampler:
        """Returns a function that samples a batch without denoising; rows of "auto" are certified."""
        if name == ORIGINAL:
            return partial(original_sampler(self.flow)[1], self.flow)
        if name in PEERS:
            return partial(PEERS[name], self.flow, **GRIDS[name][0])
        plan = choose(self.flow, name, self.batch_size, report=self.report)
        return lambda z, labels: jf.sample(
            self.flow, latents=z, labels=labels, settings=None, strategy=plan, certify=is_auto(name)
        )

    def sample(self, sampler: Sampler, num: int) -> tuple[Tensor, int]:
        """Denoised images of the first `num` latents, and the number of samples that were solved again."""
        images: list[Tensor] = []
        num_fallback = 0
        for z, labels in zip(
            *(values.split(self.batch_size) for values in latents(self.flow, num, seed=0)), strict=True
        ):
            samples = sampler(z, labels)
            num_fallback += int(samples.used_fallback.sum()) if isinstance(samples, jf.Samples) else 0
            images.append(
                jf.denoise(self.flow, samples.images, labels, self.denoise) if self.denoise else samples.images
            )
        return torch.cat(images), num_fallback

    def time(self, samplers: Mapping[str, Sampler], repeats: int) -> Json:
        z, labels = latents(self.flow, self.batch_size, seed=0)
        seconds, results = time_interleaved({name: partial(run, z, labels) for name, run in samplers.items()}, repeats)
        denoising = 0.0
        if self.denoise:
            run = partial(jf.denoise, self.flow, results[SEQUENTIAL].images, labels, self.denoise)
            denoising = time_interleaved({"denoise": run}, repeats)[0]["denoise"].median
        return {
            "repeats": repeats, "batch_size": self.batch_size,
            "denoise_seconds": denoising, "rows": to_json(seconds),
        }  # fmt: skip

    def score(
        self,
        name: str,
        images: Tensor,
        exact: Tensor,
        num_fallback: int,
        original_distance: float | None,
        timings: Json,
    ) -> Json:
        """The row of `images`; `relative` is the share of its distance above the original's."""
        pixels, exact_pixels = quantize(images), quantize(exact)
        distance = frechet_distance(
            self.real, FeatureStatistics.from_features(extract_features(self.features, [pixels]))
        )
        error, denoising = paired_error(images, exact), timings["denoise_seconds"]
        seconds = {key: value + denoising for key, value in timings["rows"][name].items()}
        return {
            "name": name, "num": len(images), "distance": distance,
            "relative": 0.0 if original_distance is None else distance / original_distance - 1,
            "max": error.max, "rms": error.rms, "pixels": asdict(pixel_difference(pixels, exact_pixels)),
            "used_fallback": num_fallback / len(images), "seconds": seconds,
            "rate": (timings["rows"][ORIGINAL]["median"] + denoising) / seconds["median"],
        }  # fmt: skip


def score_samplers(
    experiment: Experiment, names: Sequence[str], num: int, final: int | None, out: Path, settings: Json,
    repeats: int = 3,
) -> Json:  # fmt: skip
    """Times and scores all rows, then `final` samples of the best ones; returns the content of the file `out`.

    Raises:
        SystemExit: If `out` is of other settings or of another machine.
    """
    head = origin(score_samplers)
    guidance = experiment.flow.guidance
    settings = settings | {"denoise": experiment.denoise, "guidance": None if guidance is None else asdict(guidance)}
    result = settings | {"timings": None, "rows": [], "final": None} | read(out, head)
    if any(result[key] != value for key, value in settings.items()):
        raise SystemExit(f"{out}: of other settings; give another file, or remove it")
    names = list(dict.fromkeys((ORIGINAL, SEQUENTIAL, *names)))
    samplers = {name: experiment.sampler(name) for name in names}
    if result["timings"] is None or not set(names) <= result["timings"]["rows"].keys():
        result |= {"timings": experiment.time(samplers, repeats), "rows": [], "final": None}
        write_json(out, result)

    def fill(rows: list[Json], names: Sequence[str], num: int) -> None:
        """Samples and scores the rows that are missing. The original's images are those of the exact loop."""
        exact = None
        for name in names[len(rows) :]:
            exact = experiment.sample(samplers[SEQUENTIAL], num)[0] if exact is None else exact
            is_exact = name in (ORIGINAL, SEQUENTIAL)
            images, num_fallback = (exact, 0) if is_exact else experiment.sample(samplers[name], num)
            base = rows[0]["distance"] if rows else None
            row = experiment.score(name, images, exact, num_fallback, base, result["timings"])
            rows.append(row)
            print(f"{name:40s} {row['distance']:.4f} {row['relative']:+.2%} {row['max']:.1e} {row['rate']:.2f}x")
            write_json(out, result)

    fill(result["rows"], names, num)
    if final is not None:
        result["final"] = result["final"] or []
        fill(result["final"], finalists(result["rows"]), final)
    return result


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("model", help="a bundled name, or a model folder")
    arguments.add_argument("--out", type=Path, required=True, help="file of the rows (JSON)")
    arguments.add_argument(
        "--strategy", action="append", help="a row, or a peer's name; default: the paper's grid, the peers, and auto"
    )
    arguments.add_argument("--num", type=int, default=2000, help="samples a row")
    arguments.add_argument("--final", type=int, help="then so many of Original and the best two rows")
    arguments.add_argument("--batch-size", type=int, default=16, help="samples that are solved together")
    arguments.add_argument("--repeats", type=int, default=3, help="rounds of timing")
    arguments.add_argument("--features", default="fashion", choices=list(KINDS), help="the network of the distance")
    options = arguments.parse_args()
    flow = jf.load(options.model)
    path = jf.find_report(flow)
    report = None if path is None else jf.CalibrationReport.load(path)
    experiment = Experiment(
        flow.guided(flow.recommended.guidance), flow.recommended.denoise, options.batch_size,
        training_statistics(options.features), trained(options.features), report,
    )  # fmt: skip
    names = options.strategy or [*gs_jacobi_grid(report, short=True), *PEERS, *AUTOS]
    kind, against = f"{options.features}-FID", KINDS[options.features].description
    settings = {"model": options.model, "distance": kind, "against": against, "seed": 0}
    score_samplers(experiment, names, options.num, options.final, options.out, settings, options.repeats)


if __name__ == "__main__":
    keep_freed_memory()  # The same for all rows.
    main()
