"""Measures quality and time of strategies, the paper's Tables 3 and 4: `python -m benchmarks.quality MODEL --out FILE`.

A row has the Fréchet distance of its samples to real images, their error against the exact images of the same
latents, and the seconds of a batch. All rows are timed first, interleaved, on an otherwise idle machine. Writes
FILE, in hours for the paper's grid and 2,000 samples. `make paper` writes those that fill docs/results/paper.md and
docs/evaluation.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import jacobiflow as jf
from benchmarks.features import KINDS, Distance, trained_distance
from benchmarks.lib.models import latents
from benchmarks.lib.peers import AUTOS, GRIDS, PEERS, gs_jacobi_grid
from benchmarks.lib.results import Json, ResultFile, parser
from benchmarks.lib.timing import time_runs
from jacobiflow.comparison.baselines import SEQUENTIAL, original_sampler
from jacobiflow.data import quantize
from jacobiflow.evaluation import sample_errors
from jacobiflow.models.flow import Flow
from jacobiflow.models.memory import keep_freed_memory
from jacobiflow.planner import is_auto

ORIGINAL = "Original"
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
    distance: Distance
    report: jf.CalibrationReport | None = None

    def sampler(self, name: str) -> Sampler:
        """Returns a function that samples a batch without denoising; rows of "auto" are certified."""
        if name == ORIGINAL:
            return partial(original_sampler(self.flow)[1], self.flow)
        if name in PEERS:
            return partial(PEERS[name], self.flow, **GRIDS[name][0])
        strategy = name if self.report is None or is_auto(name) else jf.Strategy.parse(name, self.report)
        return lambda z, labels: jf.sample(
            self.flow, latents=z, labels=labels, settings=None, strategy=strategy, certify=is_auto(name)
        )

    def denoised(self, images: Tensor, labels: Tensor) -> Tensor:
        return jf.denoise(self.flow, images, labels, self.denoise) if self.denoise else images

    def sample(self, sampler: Sampler, num: int) -> tuple[Tensor, int]:
        """Denoised images of the first `num` latents, and the number of samples that were solved again."""
        images: list[Tensor] = []
        num_fallback = 0
        batches = (values.split(self.batch_size) for values in latents(self.flow, num, seed=0))
        for z, labels in zip(*batches, strict=True):
            samples = sampler(z, labels)
            num_fallback += int(samples.used_fallback.sum()) if isinstance(samples, jf.Samples) else 0
            images.append(self.denoised(samples.images, labels))
        return torch.cat(images), num_fallback

    def time(self, samplers: Mapping[str, Sampler], repeats: int) -> Json:
        """Seconds of a batch by every sampler, and of its denoising."""
        z, labels = latents(self.flow, self.batch_size, seed=0)
        runs: dict[str, Callable[[], Any]] = {name: partial(run, z, labels) for name, run in samplers.items()}
        noisy = samplers[SEQUENTIAL](z, labels).images
        seconds, _ = time_runs({**runs, "denoising": partial(self.denoised, noisy, labels)}, repeats)
        return {"denoise_seconds": seconds.pop("denoising")["median"] if self.denoise else 0.0, "seconds": seconds}

    def score(self, images: Tensor, exact: Tensor) -> Json:
        """The distance of images to real ones, and their differences from those of the exact loop."""
        errors = sample_errors(images, exact)
        assert errors.pixels is not None
        return {
            "distance": self.distance(quantize(images)), "max": errors.max, "rms": errors.rms,
            "pixels": asdict(errors.pixels),
        }  # fmt: skip


def score_samplers(
    experiment: Experiment, names: Sequence[str], num: int, final: int | None, out: Path, settings: Json,
    repeats: int = 3,
) -> list[Json]:  # fmt: skip
    """Times and scores all rows, then `final` samples of the best ones; returns the rows of the file `out`.

    Its first row has the times. `relative` is the share of a distance above the original's, and `rate` how many times
    faster than the original a denoised batch is.
    """
    guidance = experiment.flow.guidance
    key = settings | {
        "denoise": experiment.denoise, "guidance": None if guidance is None else asdict(guidance),
        "batch_size": experiment.batch_size,
    }  # fmt: skip
    names = list(dict.fromkeys((ORIGINAL, SEQUENTIAL, *names)))
    samplers = {name: experiment.sampler(name) for name in names}
    exact = cache(partial(experiment.sample, samplers[SEQUENTIAL]))

    with ResultFile(out, score_samplers) as file:
        timed = {"repeats": repeats, "names": names}
        times = file.row(key | timed, lambda _: experiment.time(samplers, repeats))

        def seconds(name: str) -> Json:
            return {kind: value + times["denoise_seconds"] for kind, value in times["seconds"][name].items()}

        def score(row: Json) -> Json:
            name, num = row["name"], row["num"]
            is_exact = name in (ORIGINAL, SEQUENTIAL)  # The original's images are those of the exact loop.
            images, num_fallback = exact(num) if is_exact else experiment.sample(samplers[name], num)
            scores = experiment.score(images, exact(num)[0])
            base = next((each["distance"] for each in file.rows if each.get("num") == num), scores["distance"])
            return {
                **scores, "relative": scores["distance"] / base - 1, "used_fallback": num_fallback / num,
                "seconds": seconds(name), "rate": seconds(ORIGINAL)["median"] / seconds(name)["median"],
            }  # fmt: skip

        def fill(part: str, names: Sequence[str], num: int) -> list[Json]:
            return [file.row(key | {"part": part, "name": name, "num": num}, score) for name in names]

        rows = fill("rows", names, num)
        if final is not None:
            fill("final", finalists(rows), final)
        return file.rows


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
        trained_distance(options.features), report,
    )  # fmt: skip
    names = options.strategy or [*gs_jacobi_grid(report), *PEERS, *AUTOS]
    kind, against = f"{options.features}-FID", KINDS[options.features].description
    settings = {"model": options.model, "distance": kind, "against": against, "seed": 0}
    score_samplers(experiment, names, options.num, options.final, options.out, settings, options.repeats)


if __name__ == "__main__":
    keep_freed_memory()  # The same for all rows.
    main()
