"""The trials that emoji-p2 was chosen by: `python benchmarks/emoji_trials.py`, an hour on two cores.

The first 400 steps of its training, by what was trained on and by size: `people`, the data set `emoji`, by three
shapes of the network; and `all`, every emoji of the package, by one. Needs
`npm install --no-save emoji-datasource-google@16.0.0`. A run that was stopped resumes. Then a few steps of each are
timed, since the runs themselves may share the machine.

Writes docs/results/emoji-p2-trials.json: bits per dimension of the noisy training images, the mean of 50 steps, against
seconds of training; and sheets of samples to out/trials.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

import jacobiflow as jf
from jacobiflow.data import Augmentation, ImageDataset, Noise, emoji, image_folder
from jacobiflow.data.emoji import read_index
from jacobiflow.files import write_json
from jacobiflow.measuring import machine
from jacobiflow.training import StepReport, TrainConfig, read_metrics, train

ROOT = Path(__file__).resolve().parent.parent
RESULT, OUT = ROOT / "docs" / "results" / "emoji-p2-trials.json", ROOT / "runs" / "trials"
STEPS, POINT, BATCH, TIMED = 400, 50, 32, 12
CONFIG = TrainConfig(
    steps=11000, noise=Noise("gaussian", 0.1), augmentation=Augmentation(mirror=True, shift=2, hue=10),
    batch_size=BATCH, learning_rate=7e-4, warmup=200, checkpoint_every=50,
)  # fmt: skip


class Trial(NamedTuple):
    """Images to train on, and the shape of the network."""

    images: str
    channels: int
    layers: int
    blocks: int

    def __str__(self) -> str:
        return f"{self.images}-{self.channels}x{self.layers}x{self.blocks}"


TRIALS = (
    Trial("people", 128, 4, 6), Trial("people", 192, 4, 6), Trial("people", 256, 4, 4), Trial("all", 192, 4, 6),
)  # fmt: skip


def every_emoji(folder: Path) -> ImageDataset:
    """All emoji of the package that are not of the test split, by category."""
    if not folder.exists():
        for entry in read_index():
            if not entry.in_test_split and entry.category != "Component":
                place = folder / entry.category
                place.mkdir(parents=True, exist_ok=True)
                for path in entry.images:
                    shutil.copy(path, place)
    return image_folder(folder, 32)


def flow_of(trial: Trial, classes: int) -> jf.TarFlow:
    """The flow before its training."""
    torch.manual_seed(0)
    return jf.TarFlow(
        jf.TarFlowConfig(
            3, 32, 2, trial.channels, trial.blocks, trial.layers, num_classes=classes, noise_std=CONFIG.noise.std
        )
    )


def run(trial: Trial, data: ImageDataset) -> Iterator[dict[str, float]]:
    """Train to `STEPS`, and give the mean bits per dimension of each `POINT` steps."""

    def stop(report: StepReport) -> None:
        if report.step >= STEPS:
            raise KeyboardInterrupt

    out = OUT / str(trial)
    if not out.exists() or read_metrics(out)[-1]["step"] < STEPS:
        try:
            train(flow_of(trial, len(data.classes)), data, CONFIG, out, on_step=stop)
        except KeyboardInterrupt:
            if read_metrics(out)[-1]["step"] < STEPS:
                raise
    bits = [figures["bits_per_dim"] for figures in read_metrics(out)]
    for step in range(POINT, STEPS + 1, POINT):
        yield {"step": step, "images": step * BATCH, "bits_per_dim": sum(bits[step - POINT : step]) / POINT}


def rate(trial: Trial, data: ImageDataset) -> float:
    """Images a second, by the median of a few steps after the first, which initialises the flow."""
    with tempfile.TemporaryDirectory() as out:
        train(flow_of(trial, len(data.classes)), data, replace(CONFIG, steps=TIMED), out)
        seconds = [figures["seconds"] for figures in read_metrics(out)]
    return BATCH / statistics.median(after - before for before, after in pairwise(seconds))


def main() -> None:
    """Train, time, write."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    data = {"people": emoji(), "all": every_emoji(OUT / "every-emoji")}
    found: dict[str, Any] = {}
    for trial in TRIALS:
        found[str(trial)] = {
            "num_images": len(data[trial.images]),
            "parameters": sum(p.numel() for p in flow_of(trial, 6).parameters()),
            "points": list(run(trial, data[trial.images])),
        }
        print(json.dumps({str(trial): found[str(trial)]["points"][-1]}), flush=True)
    for trial in TRIALS:
        speed = found[str(trial)]["images_per_second"] = rate(trial, data[trial.images])
        for point in found[str(trial)]["points"]:
            point["seconds"] = point["images"] / speed
    write_json(RESULT, {"command": "python benchmarks/emoji_trials.py", "machine": machine(), "trials": found})


if __name__ == "__main__":
    main()
