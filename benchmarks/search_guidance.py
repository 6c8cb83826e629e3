"""Searches guidance, attention temperature and denoising rate for the least fashion-FID (section 4.3 of the paper).

`python benchmarks/search_guidance.py` writes docs/results/fashion-p2-search.json; 20 minutes on two cores. Started
again it goes on with what the file lacks. In turn:

1. weights of annealed guidance at temperature 1;
2. attention temperatures of the unconditional row, at the best weight;
3. the weights next to the best one, at the best temperature.

Every point is 2,000 samples of the same latents and labels against the statistics of the 60,000 training images, at
each denoising rate: one gradient of log p serves all rates.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jacobiflow as jf
from jacobiflow.data import balanced_labels, quantize
from jacobiflow.evaluation import FashionFeatures, Statistics, extract, frechet_distance
from jacobiflow.files import write_json
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.latents import draw_latents
from jacobiflow.measuring import machine

RESULT = Path(__file__).resolve().parent.parent / "docs" / "results" / "fashion-p2-search.json"
MODEL, NUM, SEED, BATCH = "fashion-p2", 2000, 10, 64
RATES = (0.0, 0.6, 0.8, 1.0, 1.2, 1.4)
WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0)
TEMPERATURES = (0.7, 1.2, 1.4, 2.0)


def point(flow: ImageFlow, weight: float, temperature: float) -> list[dict[str, float]]:
    """The fashion-FID of one guidance, at every denoising rate."""
    features, real = FashionFeatures.bundled(), Statistics.bundled()
    guidance = jf.Guidance(weight, attn_temperature=temperature) if weight else None
    labels = balanced_labels(NUM, flow.config.num_classes)
    z = draw_latents(NUM, flow.config.num_tokens, flow.config.token_channels, SEED)
    out = jf.sample(flow, latents=z, labels=labels, guidance=guidance, strategy="sequential", certify=False,
                    batch_size=BATCH, progress=False)  # fmt: skip
    step = jf.denoise(flow, out.images, out.labels, 1.0) - out.images
    return [
        {
            "weight": weight, "attn_temperature": temperature, "denoise": rate,
            "fashion_fid": frechet_distance(
                real, Statistics.of(extract(features, [quantize(out.images + rate * step)]))
            ),
        }
        for rate in RATES
    ]  # fmt: skip


def main() -> None:
    """The three stages."""
    flow = jf.load(MODEL)
    rows: list[dict[str, float]] = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []

    def best() -> dict[str, float]:
        return min(rows, key=lambda row: row["fashion_fid"])

    def visit(points: Sequence[tuple[float, float]]) -> None:
        for weight, temperature in points:
            if any((row["weight"], row["attn_temperature"]) == (weight, temperature) for row in rows):
                continue
            rows.extend(point(flow, weight, temperature))
            figures: dict[str, Any] = {
                "model": MODEL, "num": NUM, "seed": SEED, "machine": machine(), "best": best(), "rows": rows,
            }  # fmt: skip
            write_json(RESULT, figures)
            found = min(rows[-len(RATES) :], key=lambda row: row["fashion_fid"])
            print(", ".join(f"{name} {value:.4g}" for name, value in found.items()), flush=True)

    visit([(weight, 1.0) for weight in WEIGHTS])
    weight = best()["weight"] or WEIGHTS[1]
    visit([(weight, temperature) for temperature in TEMPERATURES])
    weight, temperature = best()["weight"], best()["attn_temperature"]
    visit([(round(weight * factor, 3), temperature) for factor in (0.8, 1.25) if weight])
    print("best:", ", ".join(f"{name} {value:.4g}" for name, value in best().items()))


if __name__ == "__main__":
    main()
