"""Trains emoji-star, a small STARFlow of captioned emoji: `python -m examples.captions`.

It writes the bundled weights, and the losses to the run folder. It needs the emoji of `make emoji`.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import TensorDataset

import jacobiflow as jf
from jacobiflow import training
from jacobiflow.data import read_image

MODEL = Path(jf.__file__).parent / "bundled" / "emoji-star"
RUN = Path("runs/emoji-star")
PACKAGE = Path("node_modules/emoji-datasource-google")
CONFIG = jf.STARFlowConfig(
    in_channels=3, image_size=32, patch_size=2, width=128, layers_per_block=(1, 1, 6), text_tokens=12,
    text_dim=64, noise_std=0.1,
)  # fmt: skip
GUIDANCE = jf.Guidance(2, annealed=False, rule="density")
SETTINGS = jf.SamplingSettings(GUIDANCE, denoise=1.0)
PROMPTS = (
    "sunglasses", "star struck", "sob", "thinking face", "smiley cat", "broken heart", "ok hand medium skin",
    "thumbsup", "large blue diamond",
)  # fmt: skip
"""Captions that the bundled model follows in at least six of eight samples."""
SAMPLES_PER_PROMPT = 8
CATEGORY = "Smileys & Emotion"  # faces and hearts
SUBCATEGORIES = ("geometric", "hands", "hand-fingers-open", "hand-fingers-closed", "hand-fingers-partial")
REPEATS = 4  # How often an epoch has an emoji without a skin tone. The shape of a hand comes in five tones as well.
TONES = {"1F3FB": "light", "1F3FC": "medium light", "1F3FD": "medium", "1F3FE": "medium dark", "1F3FF": "dark"}


def captioned_emoji(package: Path = PACKAGE) -> tuple[UInt8[Tensor, "n 3 32 32"], list[str], list[str]]:
    """Returns faces, hearts, hands and shapes on white, captions such as "raised hand dark skin", and categories."""
    images, captions, categories = [], [], []
    index = json.loads((package / "emoji.json").read_bytes())
    for entry in sorted(index, key=lambda entry: (entry["sort_order"], entry["unified"])):
        if entry["category"] != CATEGORY and entry["subcategory"] not in SUBCATEGORIES:
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
    torch.manual_seed(0)
    flow = jf.STARFlow(replace(CONFIG, captions=tuple(captions)))
    assert flow.encode_text is not None
    rows = [i for i, caption in enumerate(captions) for _ in range(1 if caption.endswith("skin") else REPEATS)]
    images, states = images[rows], flow.encode_text(captions)[rows]
    flow.blocks[-1].null_text.copy_(flow.encode_text([""])[0])
    settings = training.TrainingConfig(steps, batch_size=32)
    average = training.train(flow, TensorDataset(images, states), settings, RUN)
    average.recommended = SETTINGS
    average.save_pretrained(MODEL, dtype=torch.bfloat16)


def main() -> None:
    """Runs the command line."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--steps", type=int, default=6000)
    train(arguments.parse_args().steps)


if __name__ == "__main__":
    main()
