"""A small STARFlow of captioned emoji: `python -m examples.captions sample "yellow heart" "large blue diamond"`.

`sample` works with the bundled weights. Without a prompt it draws those that come out well. `train` trains new weights
in the place of the bundled ones, and writes its losses to the run folder. It needs the emoji of `make emoji`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import TensorDataset

import jacobiflow as jf
from jacobiflow import plots, training
from jacobiflow.data import read_image

MODEL = Path(__file__).parent / "emoji-star"
RUN = Path("runs/emoji-star")
PACKAGE = Path("node_modules/emoji-datasource-google")
CONFIG = jf.STARFlowConfig(
    in_channels=3, image_size=32, patch_size=2, width=128, layers_per_block=(1, 1, 6), text_tokens=12,
    text_dim=64, noise_std=0.1,
)  # fmt: skip
GUIDANCE = jf.Guidance(2, annealed=False, rule="density")
SETTINGS = jf.SamplingSettings(GUIDANCE, denoise=1.0)
PROMPTS = (
    "yellow heart", "large purple circle", "large orange square", "large blue diamond", "hand light skin",
    "ok hand medium skin", "crossed fingers dark skin", "thumbsdown", "cucumber",
)  # fmt: skip
"""Captions that the bundled model follows in at least six of eight samples."""
SAMPLES_PER_PROMPT = 8
CATEGORIES = ("Smileys & Emotion", "Animals & Nature", "Food & Drink")
SUBCATEGORIES = ("geometric", "hands", "hand-fingers-open", "hand-fingers-closed", "hand-fingers-partial")
TONES = {"1F3FB": "light", "1F3FC": "medium light", "1F3FD": "medium", "1F3FE": "medium dark", "1F3FF": "dark"}


def encode_text(prompts: list[str]) -> Float[Tensor, "n 12 64"]:
    """Returns a random vector for each word, which depends on the word only, and one for the end of the text."""
    states = torch.zeros(len(prompts), CONFIG.text_tokens, CONFIG.text_dim)
    for i, prompt in enumerate(prompts):
        words = [*re.findall(r"[a-z0-9]+", prompt.lower())[: CONFIG.text_tokens - 1], "."]
        for j, word in enumerate(words):
            seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
            states[i, j] = torch.from_numpy(np.random.default_rng(seed).standard_normal(CONFIG.text_dim))
    return states


def captioned_emoji(package: Path = PACKAGE) -> tuple[UInt8[Tensor, "n 3 32 32"], list[str], list[str]]:
    """Returns emoji on white, their captions, such as "raised hand dark skin", and their categories."""
    images, captions, categories = [], [], []
    index = json.loads((package / "emoji.json").read_bytes())
    for entry in sorted(index, key=lambda entry: (entry["sort_order"], entry["unified"])):
        if entry["category"] not in CATEGORIES and entry["subcategory"] not in SUBCATEGORIES:
            continue
        caption = re.sub("[_-]+", " ", entry["short_names"][-1 if entry["short_name"] in ("+1", "-1") else 0])
        variations = {f"{caption} {tone} skin": code for code, tone in TONES.items()}
        of_tones = {name: entry.get("skin_variations", {}).get(code) for name, code in variations.items()}
        for name, image in {caption: entry, **of_tones}.items():
            if image is not None and image["has_img_google"]:
                images.append(read_image(package / "img" / "google" / "64" / image["image"], CONFIG.image_size, 3))
                captions.append(name)
                categories.append(entry["category"])
    return torch.stack(images), captions, categories


def train(steps: int) -> None:
    """Trains the model; the same command again resumes a run that was stopped."""
    images, captions, _ = captioned_emoji()
    states = encode_text(captions)
    torch.manual_seed(0)
    flow = jf.STARFlow(CONFIG)
    flow.blocks[-1].null_text.copy_(encode_text([""])[0])
    settings = training.TrainingConfig(steps, batch_size=32)
    average = training.train(flow, TensorDataset(images, states), settings, RUN)
    average.recommended = SETTINGS
    average.save_pretrained(MODEL, dtype=torch.bfloat16)


def load() -> jf.STARFlow:
    """Loads the bundled model, with its text encoder."""
    flow = jf.STARFlow.from_pretrained(MODEL).requires_grad_(False)
    flow.encode_text = encode_text
    return flow


def write_sheet(flow: jf.STARFlow, prompts: Sequence[str], path: Path) -> None:
    """Writes a picture with a row of samples for each prompt."""
    rows = []
    for prompt in prompts:
        samples = jf.sample(flow, SAMPLES_PER_PROMPT, context=prompt, settings=SETTINGS)
        print(f"{prompt}: {samples.outcome}")
        rows.append((prompt, samples.images))
    path.parent.mkdir(parents=True, exist_ok=True)
    plots.save_png(plots.rows_sheet(rows), path)
    print(f"wrote {path}")


def main() -> None:
    """Runs the command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = arguments.add_subparsers(dest="command", required=True)
    commands.add_parser("train").add_argument("--steps", type=int, default=4500)
    drawing = commands.add_parser("sample")
    drawing.add_argument("prompts", nargs="*", default=PROMPTS, help="texts, each drawn eight times")
    drawing.add_argument("--out", type=Path, default=Path("out/captions.png"), help="the picture; %(default)s")
    options = arguments.parse_args()
    if options.command == "train":
        train(options.steps)
    else:
        write_sheet(load(), options.prompts, options.out)


if __name__ == "__main__":
    main()
