"""Measures STARFlow: `python -m benchmarks.star`.

With emoji-star, the model of captioned emoji: samples under guidance by the two samplers of the original code and by
ours, and how often a sample is nearest to the emoji of its caption. Writes
docs/results/starflow.json and docs/results/captions.json, which fill docs/starflow.md, and
docs/figures/emoji-star.png.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import jacobiflow as jf
from benchmarks import FIGURES
from benchmarks.lib.models import latents, sample
from benchmarks.lib.peers import starflow
from benchmarks.lib.results import Json, measure_files
from benchmarks.lib.timing import time_runs
from examples.captions import GUIDANCE, PROMPTS, SAMPLES_PER_PROMPT, SETTINGS, captioned_emoji
from jacobiflow import plots
from jacobiflow.comparison.baselines import TOKEN_LOOP, original_sampler
from jacobiflow.data import scale
from jacobiflow.evaluation import sample_errors

MODEL = "emoji-star"
BATCHES, ROUNDS, ITERATION = (1, 16), 3, "block iteration"
MIN_RIGHT = 6  # Samples of eight that must be right for a prompt that the docs show.
CATEGORIES = {
    "People & Body": "hands",
    "Symbols": "geometric shapes",
    "Smileys & Emotion": "faces and hearts",
}
GUIDANCES = {"plain": None, "guided": GUIDANCE}


def speeds(key: Json) -> Json:
    """Seconds of a batch by each sampler, and errors against the exact inverse in float64."""
    flow, batch = jf.load(MODEL).guided(GUIDANCE), key["batch"]
    z, prompts = latents(flow, batch, prompts=PROMPTS)
    context = flow.context_kind.resolve(prompts, batch)
    runs: dict[str, Callable[[], Any]] = {
        TOKEN_LOOP: partial(original_sampler(flow)[1], flow, z, context.values),
        ITERATION: lambda: starflow(flow, z, context.values, fresh_keys=False).images,
        "auto": partial(sample, flow, jf.plan(flow, batch_size=batch), z, context, certify=True),
    }
    seconds, results = time_runs({name: torch.no_grad()(run) for name, run in runs.items()}, ROUNDS)
    exact = sample(copy.deepcopy(flow).double(), "sequential", z.double(), context).x
    images = {name: getattr(results[name], "x", results[name]) for name in runs}
    return {
        "seconds": seconds,
        "errors": {name: sample_errors(x.double(), exact).max for name, x in images.items()},
    }


def nearest_emoji(images: Tensor, emoji: Tensor) -> Tensor:
    """The indices of the five emoji that are nearest to each image in pixels, the nearest first."""
    distances = torch.cdist(images.flatten(1).clamp(-1, 1), scale(emoji).flatten(1))
    return distances.topk(5, largest=False).indices


def follows(key: Json) -> Json:
    """The shares of samples whose nearest emoji, or one of the nearest five, is that of their caption, by category."""
    settings = jf.SamplingSettings(GUIDANCES[key["follows"]], denoise=SETTINGS.denoise)
    emoji, captions, categories = captioned_emoji()
    flow, is_right = jf.load(MODEL), []
    for i, caption in enumerate(captions):
        samples = jf.sample(flow, SAMPLES_PER_PROMPT, context=caption, settings=settings)
        is_right.append(nearest_emoji(samples.images, emoji) == i)
    each = torch.stack(is_right)
    rows = {name: [other == category for other in categories] for category, name in CATEGORIES.items()}
    rows["all"] = [True] * len(each)
    groups = {name: shares_right(each[torch.tensor(of_group)]) for name, of_group in rows.items()}
    return {"samples": SAMPLES_PER_PROMPT, "most": MIN_RIGHT, "groups": groups}


def shares_right(is_right: Tensor) -> Json:
    """Metrics of the captions of a category: `is_right` of each caption, sample and nearest emoji."""
    nearest = is_right[..., 0]
    return {
        "captions": len(is_right),
        "nearest": float(nearest.float().mean()),
        "among_five": float(is_right.any(dim=2).float().mean()),
        "mostly_right": int((nearest.sum(dim=1) >= MIN_RIGHT).sum()),
    }


def draw_sheet() -> None:
    """Draws samples of each prompt, and counts those that are nearest to the emoji of their caption."""
    flow, rows = jf.load(MODEL), []
    emoji, captions, _ = captioned_emoji()
    for prompt in PROMPTS:
        images = jf.sample(flow, SAMPLES_PER_PROMPT, context=prompt, settings=SETTINGS).images
        num = int((nearest_emoji(images, emoji)[:, 0] == captions.index(prompt)).sum())
        if num < MIN_RIGHT:
            raise SystemExit(f"{prompt}: {num} of {len(images)} samples are right; show another prompt")
        rows.append((f'"{prompt}": {num} of {len(images)} right', images))
    plots.save_png(plots.rows_sheet(rows), FIGURES / "emoji-star.png")


def main() -> None:
    measure_files(__doc__, {
        "starflow": [([{"batch": batch} for batch in BATCHES], speeds)],
        "captions": [([{"follows": name} for name in GUIDANCES], follows)],
    })  # fmt: skip
    draw_sheet()


if __name__ == "__main__":
    main()
