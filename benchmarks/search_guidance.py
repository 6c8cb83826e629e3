"""Searches guidance, attention temperature and denoising rate: `python -m benchmarks.search_guidance [MODEL]`.

Writes docs/results/MODEL-search.json, which fills docs/paper.md, in one (digits-maf) to 40 minutes (emoji-p2) on two
cores. First come weights of annealed guidance at temperature 1, then attention temperatures at the best weight, then
the weights next to the best one. Every point has the same latents and labels, and all denoising rates: one gradient
of log p serves all of them. The best point is recommended, with two exceptions: no guidance if it does not make the
distance a tenth less, and a denoising rate of 1 if that is within 1% of the best rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from jaxtyping import Float, UInt8
from torch import Tensor

import jacobiflow as jf
from benchmarks.common import RESULTS, Json, latents, origin, parser, read
from benchmarks.features import trained, training_statistics
from jacobiflow.data import digits, quantize, scale
from jacobiflow.evaluation import FeatureStatistics, extract_features, frechet_distance
from jacobiflow.models.flow import Flow
from jacobiflow.utils import serialization
from jacobiflow.utils.files import write_json

SEED, BATCH = 10, 64
RATES = (0.0, 0.6, 0.8, 1.0, 1.2, 1.4)
WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0)
TEMPERATURES = (0.7, 1.2, 1.4, 2.0)
GAIN, NEAR = 0.9, 1.01  # Ratios of distances: a gain, and a tie.


class Measure(NamedTuple):
    """A distance to real images: its name in the file, the features of 8-bit images, and those of the real ones.

    `num` is the number of samples at a point.
    """

    name: str
    features: Callable[[UInt8[Tensor, "n c h w"]], Float[Tensor, "n d"]]
    real: FeatureStatistics
    num: int = 2000


def bundled_fid(kind: str, num: int) -> Measure:
    return Measure(
        f"{kind}_fid", lambda images: extract_features(trained(kind), [images]), training_statistics(kind), num
    )


def pixel_distance() -> Measure:
    """The Fréchet distance of pixels, against scikit-learn's 1,797 digits."""
    return Measure("pixel_distance", pixels, FeatureStatistics.from_features(pixels(digits().images[:])))


def pixels(images: Tensor) -> Tensor:
    return scale(images).flatten(1)


MEASURES: dict[str, Callable[[], Measure]] = {
    "fashion-p2": partial(bundled_fid, "fashion", 2000),
    "emoji-p2": partial(bundled_fid, "emoji", 600),
    "digits-p1": pixel_distance,
    "digits-maf": pixel_distance,
}


def recommended(rows: Sequence[dict[str, float]], name: str) -> jf.SamplingSettings:
    best = min(rows, key=lambda row: row[name])
    plain = min((row for row in rows if not row["weight"]), key=lambda row: row[name])
    best = best if best[name] <= GAIN * plain[name] else plain
    same = [row for row in rows if all(row[key] == best[key] for key in ("weight", "attn_temperature"))]
    one = [row for row in same if row["denoise"] == 1 and row[name] <= NEAR * best[name]]
    weight, temperature = best["weight"], best["attn_temperature"]
    guidance = jf.Guidance(weight, attn_temperature=temperature) if weight else None
    return jf.SamplingSettings(guidance, (one or [best])[0]["denoise"])


def point(flow: Flow, measure: Measure, weight: float, temperature: float) -> list[Json]:
    """The distance under one guidance, at every denoising rate."""
    guidance = jf.Guidance(weight, attn_temperature=temperature) if weight else None
    z, labels = latents(flow, measure.num, SEED)
    samples = jf.sample(
        flow,
        latents=z,
        labels=labels,
        settings=jf.SamplingSettings(guidance),
        strategy="sequential",
        certify=False,
        batch_size=BATCH,
    )
    noisy = flow.config.noise_std > 0
    rates, images = RATES if noisy else (0.0,), samples.images
    step = jf.denoise(flow, images, labels, 1.0) - images if noisy else 0.0
    rows = []
    for rate in rates:
        statistics = FeatureStatistics.from_features(measure.features(quantize(images + rate * step)))
        distance = frechet_distance(measure.real, statistics)
        rows.append({"weight": weight, "attn_temperature": temperature, "denoise": rate, measure.name: distance})
    return rows


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("model", nargs="?", default="fashion-p2", choices=MEASURES)
    model = arguments.parse_args().model
    flow, measure, out = jf.load(model), MEASURES[model](), RESULTS / f"{model}-search.json"
    result = read(out, origin(point))
    rows = result.setdefault("rows", [])

    def best() -> Json:
        return min(rows, key=lambda row: row[measure.name])

    def visit(points: Sequence[tuple[float, float]]) -> None:
        for weight, temperature in points:
            if any((row["weight"], row["attn_temperature"]) == (weight, temperature) for row in rows):
                continue
            new = point(flow, measure, weight, temperature)
            rows.extend(new)
            settings = serialization.encode(recommended(rows, measure.name))
            found = {"model": model, "num": measure.num, "seed": SEED, "best": best(), "recommended": settings}
            write_json(out, result | found | {"rows": rows})
            print(min(new, key=lambda row: row[measure.name]), flush=True)

    visit([(weight, 1.0) for weight in WEIGHTS])
    if isinstance(flow, jf.TarFlow):
        weight = best()["weight"] or WEIGHTS[1]
        visit([(weight, temperature) for temperature in TEMPERATURES])
    weight, temperature = best()["weight"], best()["attn_temperature"]
    visit([(round(weight * factor, 3), temperature) for factor in (0.8, 1.25) if weight])
    print("best:", best())


if __name__ == "__main__":
    main()
