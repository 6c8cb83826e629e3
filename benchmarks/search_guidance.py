"""Searches guidance, attention temperature and denoising rate for the least distance to real images (section 4.3 of the
paper).

`python -m benchmarks.search_guidance [MODEL]` writes docs/results/MODEL-search.json, for fashion-p2 (20 minutes on two
cores), emoji-p2 (40 minutes), digits-p1 (two minutes) or digits-maf (one). Started again it goes on with what the file
lacks. In turn:

1. weights of annealed guidance at temperature 1;
2. attention temperatures of the unconditional row, at the best weight, where the flow has attention;
3. the weights next to the best one, at the best temperature.

Every point is 2,000 samples (600 of emoji-p2) of the same latents and labels against all training images, at each
denoising rate where the flow has noise to remove: one gradient of log p serves all rates. fashion-p2 is measured by
fashion-FID, emoji-p2 by emoji-FID; digits of 8x8 pixels by the Fréchet distance of the 64 pixels themselves, in
[-1, 1]: it compares means and covariances of pixels, and nothing else.

What is recommended, in the file and in the model's config.json, is the best point, with two exceptions: no guidance
if it does not make the distance a tenth less, and a denoising rate of 1 where that is within 1% of the best rate.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from jaxtyping import Float, UInt8
from torch import Tensor

import jacobiflow as jf
from benchmarks.common import RESULTS
from benchmarks.features import trained, training_statistics
from jacobiflow import codec
from jacobiflow.data import balanced_labels, digits, quantize, scale
from jacobiflow.evaluation import Statistics, extract, frechet_distance
from jacobiflow.files import write_json
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.latents import draw_latents
from jacobiflow.measuring import machine

SEED, BATCH = 10, 64
RATES = (0.0, 0.6, 0.8, 1.0, 1.2, 1.4)
WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0)
TEMPERATURES = (0.7, 1.2, 1.4, 2.0)
_GAIN, _NEAR = 0.9, 1.01


class Measure(NamedTuple):
    """A distance to real images: its name in the file, the features of 8-bit images, and those of the real ones.

    `num` is the number of samples at a point.
    """

    name: str
    features: Callable[[UInt8[Tensor, "n c h w"]], Float[Tensor, "n d"]]
    real: Statistics
    num: int = 2000


def bundled_fid(kind: str, num: int) -> Measure:
    """fashion-FID or emoji-FID, against all training images."""
    network = trained(kind)
    return Measure(f"{kind}_fid", lambda images: extract(network, [images]), training_statistics(kind), num)


def pixel_distance() -> Measure:
    """The Fréchet distance of pixels, against scikit-learn's 1,797 digits."""

    def features(images: Tensor) -> Tensor:
        return scale(images).flatten(1)

    return Measure("pixel_distance", features, Statistics.of(features(digits().images)))


MODELS: dict[str, Callable[[], Measure]] = {
    "fashion-p2": partial(bundled_fid, "fashion", 2000),
    "emoji-p2": partial(bundled_fid, "emoji", 600),
    "digits-p1": pixel_distance,
    "digits-maf": pixel_distance,
}


def recommended(rows: Sequence[dict[str, float]], name: str) -> jf.SamplingSettings:
    """Returns the settings that a search recommends by the distance `name`."""
    best = min(rows, key=lambda row: row[name])
    plain = min((row for row in rows if not row["weight"]), key=lambda row: row[name])
    best = best if best[name] <= _GAIN * plain[name] else plain
    same = [row for row in rows if all(row[key] == best[key] for key in ("weight", "attn_temperature"))]
    one = [row for row in same if row["denoise"] == 1 and row[name] <= _NEAR * best[name]]
    weight, temperature = best["weight"], best["attn_temperature"]
    guidance = jf.Guidance(weight, attn_temperature=temperature) if weight else None
    return jf.SamplingSettings(guidance, (one or [best])[0]["denoise"])


def point(flow: ImageFlow, measure: Measure, weight: float, temperature: float) -> list[dict[str, float]]:
    """The distance under one guidance, at every denoising rate."""
    guidance = jf.Guidance(weight, attn_temperature=temperature) if weight else None
    labels = balanced_labels(measure.num, flow.config.num_classes)
    z = draw_latents(measure.num, flow.config.num_tokens, flow.config.token_channels, SEED)
    out = jf.sample(flow.guided(guidance), latents=z, labels=labels, strategy="sequential", certify=False,
                    batch_size=BATCH)  # fmt: skip
    rates = RATES if flow.config.noise_std else (0.0,)
    step = jf.denoise(flow, out.images, out.labels, 1.0) - out.images if flow.config.noise_std else 0.0
    return [
        {
            "weight": weight, "attn_temperature": temperature, "denoise": rate,
            measure.name: frechet_distance(
                measure.real, Statistics.of(measure.features(quantize(out.images + rate * step)))
            ),
        }
        for rate in rates
    ]  # fmt: skip


def main() -> None:
    """The three stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="fashion-p2", choices=MODELS)
    model = parser.parse_args().model
    flow, measure, file = jf.load(model), MODELS[model](), RESULTS / f"{model}-search.json"
    figures: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"machine": machine(), "rows": []}
    rows: list[dict[str, float]] = figures["rows"]

    def best() -> dict[str, float]:
        return min(rows, key=lambda row: row[measure.name])

    def write() -> None:
        settings = codec.encode(recommended(rows, measure.name))
        head = {"model": model, "num": measure.num, "seed": SEED, "machine": figures["machine"], "best": best()}
        write_json(file, {**head, "recommended": settings, "rows": rows})

    def visit(points: Sequence[tuple[float, float]]) -> None:
        for weight, temperature in points:
            if any((row["weight"], row["attn_temperature"]) == (weight, temperature) for row in rows):
                continue
            new = point(flow, measure, weight, temperature)
            rows.extend(new)
            write()
            nearest = min(new, key=lambda row: row[measure.name])
            print(", ".join(f"{name} {value:.4g}" for name, value in nearest.items()), flush=True)

    visit([(weight, 1.0) for weight in WEIGHTS])
    if isinstance(flow, jf.TarFlow):
        weight = best()["weight"] or WEIGHTS[1]
        visit([(weight, temperature) for temperature in TEMPERATURES])
    weight, temperature = best()["weight"], best()["attn_temperature"]
    visit([(round(weight * factor, 3), temperature) for factor in (0.8, 1.25) if weight])
    write()
    print("best:", ", ".join(f"{name} {value:.4g}" for name, value in best().items()))


if __name__ == "__main__":
    main()
