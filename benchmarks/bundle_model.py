"""Puts a trained model into the package: `python benchmarks/bundle_model.py --help`.

Writes config.json, with the settings that docs/results/NAME-search.json recommends, and half-precision weights to
src/jacobiflow/models/NAME, figures of the model to docs/results/NAME.json, and its loss curve to docs/figures. Every
figure is measured on the bundled weights. `python benchmarks/model_cards.py --measure` writes the card.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.progress import Progress

import jacobiflow as jf
from jacobiflow.data import ImageDataset, Noise, load_images
from jacobiflow.evaluation import bayes_accuracy, bits_per_dim
from jacobiflow.files import write_json
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.plots import save_png
from jacobiflow.plots.style import TOUGH, clear, new_figure, styled

ROOT = Path(__file__).resolve().parent.parent
BITS = {"gaussian": "bits_per_dim_noisy", "uniform": "bits_per_dim"}


def noise_of(flow: ImageFlow) -> Noise:
    """The noise of the flow's training."""
    return Noise("gaussian", flow.config.noise_std) if flow.config.noise_std else Noise("uniform")


def measure(flow: ImageFlow, test: ImageDataset, accuracy_images: int) -> dict[str, float]:
    """Bits per dimension of all of `test`, class accuracy of its first images."""
    noise = noise_of(flow)
    labels = test.labels
    if labels is None:
        raise ValueError("the test images have no labels")
    few = replace(test, images=test.images[:accuracy_images], labels=labels[:accuracy_images])
    with Progress() as bar:
        task = bar.add_task("bits per dimension", total=len(test))
        bpd = bits_per_dim(flow, test, noise, on_batch=lambda n: bar.advance(task, n))
        task = bar.add_task("class accuracy", total=len(few))
        accuracy = bayes_accuracy(flow, few, noise, on_batch=lambda n: bar.advance(task, n))
    return {BITS[noise.kind]: bpd, "bayes_accuracy": accuracy, "accuracy_images": len(few)}


@styled
def loss_figure(metrics: list[dict[str, float]]) -> Figure:
    """The loss curve, each point the mean of 50 steps."""
    steps, losses = (np.array([row[key] for row in metrics]) for key in ("step", "loss"))
    usable = len(losses) // 50 * 50
    figure = new_figure(3.4)
    axis = figure.subplots()
    axis.plot(steps[:usable].reshape(-1, 50).mean(1), losses[:usable].reshape(-1, 50).mean(1), color=TOUGH)
    axis.set(xlabel="step", ylabel="loss (nats per dimension)")
    clear(axis)
    return figure


def main() -> None:
    """Bundle, measure, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the bundled model")
    parser.add_argument("run", type=Path, help="folder that jacobiflow train wrote")
    parser.add_argument("--images", required=True, help="test images, as for jacobiflow")
    parser.add_argument("--images-name", required=True, help="of the data set, for the card")
    parser.add_argument("--license", required=True, help="of the data set, for the card")
    parser.add_argument("--dataset", action="append", default=[], help="the data set's id on the hub, for the card")
    parser.add_argument("--test-name", required=True, help="what the test images are, for the card")
    parser.add_argument("--command", required=True, help="that trained the model, for the card")
    parser.add_argument("--machine", required=True, help="that trained it, for the card")
    parser.add_argument("--limits", required=True, help="one or two sentences, for the card")
    parser.add_argument("--accuracy-images", type=int, default=1000)
    arguments = parser.parse_args()

    folder = ROOT / "src" / "jacobiflow" / "models" / arguments.name
    trained, search = jf.load(arguments.run), ROOT / "docs" / "results" / f"{arguments.name}-search.json"
    if search.is_file():
        trained.recommended = jf.SamplingSettings.from_json(json.loads(search.read_text())["recommended"])
    trained.save_pretrained(folder, dtype=torch.float16)
    flow = jf.load(arguments.name)
    config = flow.config
    metrics = [json.loads(line) for line in (arguments.run / "metrics.jsonl").read_text().splitlines()]
    test = load_images(arguments.images, config.image_size, config.in_channels, "test")
    figures: dict[str, Any] = {
        "name": arguments.name,
        "images": arguments.images_name,
        "images_license": arguments.license,
        "datasets": arguments.dataset,
        "limits": arguments.limits,
        "command": arguments.command,
        "machine": arguments.machine,
        "steps": metrics[-1]["step"],
        "training_seconds": metrics[-1]["seconds"],
        "parameters": sum(p.numel() for p in flow.parameters()),
        "bytes": (folder / "model.safetensors").stat().st_size,
        "test_images": len(test),
        "test_name": arguments.test_name,
        **measure(flow, test, arguments.accuracy_images),
        "loss": [[row["step"], row["loss"]] for row in metrics[49::50]],
    }
    save_png(loss_figure(metrics), ROOT / "docs" / "figures" / f"{arguments.name}-loss.png")
    write_json(ROOT / "docs" / "results" / f"{arguments.name}.json", figures)
    print(f"bundled {folder}: class accuracy {figures['bayes_accuracy']:.1%}")


if __name__ == "__main__":
    main()
