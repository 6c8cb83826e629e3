"""Searches guidance, attention temperature and denoising rate: `python -m benchmarks.search_guidance [MODEL]`.

Writes docs/results/MODEL-search.json, which fills docs/paper.md, in one (digits-maf) to 40 minutes (emoji-p2) on two
cores. First come weights of annealed guidance at temperature 1, then attention temperatures at the best weight, then
the weights next to the best one. Every point has the same latents and labels, and all denoising rates: one gradient
of log p serves all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

from torch import Tensor

import jacobiflow as jf
from benchmarks import RESULTS
from benchmarks.features import Distance, pixel_distance, trained_distance
from benchmarks.lib.models import latents
from benchmarks.lib.results import Json, ResultFile, parser
from jacobiflow.data import quantize
from jacobiflow.models.flow import Flow

SEED, BATCH = 10, 64
RATES = (0.0, 0.6, 0.8, 1.0, 1.2, 1.4)
WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0)
TEMPERATURES = (0.7, 1.2, 1.4, 2.0)
GAIN, NEAR = 0.9, 1.01  # Ratios of distances: a gain, and a tie.


# The distance of each model, and the number of samples at a point.
MODELS: dict[str, tuple[Callable[[], Distance], int]] = {
    "fashion-p2": (partial(trained_distance, "fashion"), 2000),
    "emoji-p2": (partial(trained_distance, "emoji"), 600),
    "digits-p1": (pixel_distance, 2000),
    "digits-maf": (pixel_distance, 2000),
}


def best_point(rows: Sequence[Json]) -> Json:
    return min(rows, key=lambda row: row["distance"])


def recommended(rows: Sequence[Json]) -> jf.SamplingSettings:
    """The settings of the best point, with two exceptions.

    No guidance if it does not make the distance a tenth less, and a denoising rate of 1 if that is within 1% of the
    best rate.
    """
    best, plain = best_point(rows), best_point([row for row in rows if not row["weight"]])
    best = best if best["distance"] <= GAIN * plain["distance"] else plain
    weight, temperature, distance = best["weight"], best["attn_temperature"], best["distance"]
    same = [row for row in rows if (row["weight"], row["attn_temperature"]) == (weight, temperature)]
    is_one_near = any(row["denoise"] == 1 and row["distance"] <= NEAR * distance for row in same)
    guidance = jf.Guidance(weight, attn_temperature=temperature) if weight else None
    return jf.SamplingSettings(guidance, 1.0 if is_one_near else best["denoise"])


def search(flow: Flow, measure: Distance, file: ResultFile, key: Json) -> None:
    """Fills a result file with the distance at every point and denoising rate."""
    z, labels = latents(flow, key["num"], SEED)
    is_noisy = flow.config.noise_std > 0

    @cache
    def samples(weight: float, temperature: float) -> tuple[Tensor, Tensor | float]:
        """Samples under one guidance, and the step of their denoising at a rate of 1."""
        settings = jf.SamplingSettings(jf.Guidance(weight, attn_temperature=temperature) if weight else None)
        images = jf.sample(
            flow, latents=z, labels=labels, settings=settings, strategy="sequential", certify=False, batch_size=BATCH
        ).images
        return images, jf.denoise(flow, images, labels, 1.0) - images if is_noisy else 0.0

    def distance(point: Json) -> Json:
        images, step = samples(point["weight"], point["attn_temperature"])
        return {"distance": measure(quantize(images + point["denoise"] * step))}

    def visit(points: Sequence[tuple[float, float]]) -> Json:
        for weight, temperature in points:
            for rate in RATES if is_noisy else (0.0,):
                point = {"weight": weight, "attn_temperature": temperature, "denoise": rate}
                file.row(key | point, distance)
            samples.cache_clear()
        return best_point(file.rows)

    best = visit([(weight, 1.0) for weight in WEIGHTS])
    if isinstance(flow, jf.TarFlow):
        weight = best["weight"] or WEIGHTS[1]
        best = visit([(weight, temperature) for temperature in TEMPERATURES])
    weight, temperature = best["weight"], best["attn_temperature"]
    print("best:", visit([(round(weight * factor, 3), temperature) for factor in (0.8, 1.25) if weight]))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("model", nargs="?", default="fashion-p2", choices=MODELS)
    model = arguments.parse_args().model
    make_distance, num = MODELS[model]
    measure = make_distance()
    key = {"model": model, "num": num, "seed": SEED, "measure": measure.name}
    with ResultFile(RESULTS / f"{model}-search.json", search) as file:
        search(jf.load(model), measure, file, key)


if __name__ == "__main__":
    main()
