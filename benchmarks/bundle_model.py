"""Puts a trained model into the package with its model card: `python benchmarks/bundle_model.py --help`.

Writes config.json, half-precision weights and README.md (the card) to src/jacobiflow/models/NAME, the figures of the
card to docs/results/NAME.json, and its pictures to docs/figures. Every figure is measured on the bundled weights.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.progress import Progress

import jacobiflow as jf
from jacobiflow.data import ImageDataset, load_images
from jacobiflow.evaluation import bayes_accuracy, bits_per_dim
from jacobiflow.files import write_atomically, write_json
from jacobiflow.flows.checkpoints import save
from jacobiflow.plots import image_grid, save_png
from jacobiflow.training import Noise

ROOT = Path(__file__).resolve().parent.parent
GUIDANCE = jf.Guidance(1.0)

CARD = """# {name}

A TarFlow of {images} ({license}), class-conditional over {num_classes} classes. `jacobiflow.load("{name}")`.

| | |
| --- | --- |
| images | {size}x{size}, {in_channels} channel, in [-1, 1], Gaussian noise of standard deviation {noise_std} |
| shape | patch {patch_size} (T = {num_tokens}, C = {token_channels}), {num_blocks} blocks x {layers} layers x \
{channels} channels, {parameters:,} parameters, float16, {megabytes:.1f} MB |
| training | `{command}`: {steps:,} steps in {hours:.2f} h on {machine} |
| bits per dimension of noisy images | {bpd:.3f} ({test_name}, Gaussian noise {noise_std}, their labels) |
| class accuracy by Bayes' rule | {accuracy:.1%} ({accuracy_images:,} of them, the same noise) |

Bits per dimension are in units of 8-bit pixels (-log2 p / D + log2 128) and belong to the *noisy* images that the
model was trained on; they do not compare with figures of dequantised images.

Training loss (mean of 50 steps):

![loss curve](../../../../docs/figures/{name}-loss.png)

Samples, two a class: as drawn, and with guidance of weight 1 (annealed) and one denoising step.

![samples](../../../../docs/figures/{name}-samples.png)

Limits: {limits} Figures: docs/results/{name}.json, by `python benchmarks/bundle_model.py`.
"""


def measure(flow: jf.TarFlow, test: ImageDataset, accuracy_images: int) -> dict[str, float]:
    """Bits per dimension of all of `test`, class accuracy of its first images."""
    noise = Noise("gaussian", flow.config.noise_std)
    labels = test.labels
    if labels is None:
        raise ValueError("the test images have no labels")
    few = replace(test, images=test.images[:accuracy_images], labels=labels[:accuracy_images])
    with Progress() as bar:
        task = bar.add_task("bits per dimension", total=len(test))
        bpd = bits_per_dim(flow, test, noise, on_batch=lambda n: bar.advance(task, n))
        task = bar.add_task("class accuracy", total=len(few))
        accuracy = bayes_accuracy(flow, few, noise, on_batch=lambda n: bar.advance(task, n))
    return {"bits_per_dim_noisy": bpd, "bayes_accuracy": accuracy, "accuracy_images": len(few)}


def draw_pictures(flow: jf.TarFlow, name: str, metrics: list[dict[str, float]]) -> None:
    """The loss curve and the sheet of samples."""
    figures = ROOT / "docs" / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    steps, losses = (np.array([row[key] for row in metrics]) for key in ("step", "loss"))
    usable = len(losses) // 50 * 50
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    axis.plot(steps[:usable].reshape(-1, 50).mean(1), losses[:usable].reshape(-1, 50).mean(1), color="#0072b2")
    axis.set(xlabel="step", ylabel="loss (nats per dimension)")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(figures / f"{name}-loss.png", dpi=110)
    plt.close(figure)
    labels = torch.arange(20) % flow.config.num_classes
    plain = jf.sample(flow, num=20, labels=labels, seed=0)
    guided = jf.sample(flow, num=20, labels=labels, seed=0, guidance=GUIDANCE, denoise=1.0)
    zoom = 2 if flow.config.image_size >= 28 else 6
    order = labels.argsort(stable=True)
    sheet = torch.cat((plain.images[order], guided.images[order]))
    save_png(image_grid(sheet, columns=20, zoom=zoom), figures / f"{name}-samples.png")


def main() -> None:
    """Bundle, measure, draw, write the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the bundled model")
    parser.add_argument("run", type=Path, help="folder that jacobiflow train wrote")
    parser.add_argument("--images", required=True, help="test images, as for jacobiflow")
    parser.add_argument("--images-name", required=True, help="of the data set, for the card")
    parser.add_argument("--license", required=True, help="of the data set, for the card")
    parser.add_argument("--test-name", required=True, help="what the test images are, for the card")
    parser.add_argument("--command", required=True, help="that trained the model, for the card")
    parser.add_argument("--machine", required=True, help="that trained it, for the card")
    parser.add_argument("--limits", required=True, help="one or two sentences, for the card")
    parser.add_argument("--accuracy-images", type=int, default=1000)
    arguments = parser.parse_args()
    matplotlib.use("Agg")

    folder = ROOT / "src" / "jacobiflow" / "models" / arguments.name
    save(jf.load(arguments.run), folder, torch.float16)
    flow = jf.load(arguments.name)
    config = flow.config
    metrics = [json.loads(line) for line in (arguments.run / "metrics.jsonl").read_text().splitlines()]
    test = load_images(arguments.images, config.image_size, config.in_channels, "test")
    figures: dict[str, Any] = {
        "name": arguments.name,
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
    draw_pictures(flow, arguments.name, metrics)
    write_json(ROOT / "docs" / "results" / f"{arguments.name}.json", figures)
    card = CARD.format(
        name=arguments.name, images=arguments.images_name, license=arguments.license, num_classes=config.num_classes,
        size=config.image_size, in_channels=config.in_channels, noise_std=config.noise_std,
        patch_size=config.patch_size, num_tokens=config.num_tokens, token_channels=config.token_channels,
        num_blocks=config.num_blocks, layers=config.layers_per_block, channels=config.channels,
        parameters=figures["parameters"], megabytes=figures["bytes"] / 1e6, command=arguments.command,
        steps=figures["steps"], hours=figures["training_seconds"] / 3600, machine=arguments.machine,
        bpd=figures["bits_per_dim_noisy"], test_name=arguments.test_name, accuracy=figures["bayes_accuracy"],
        accuracy_images=figures["accuracy_images"], limits=arguments.limits,
    )  # fmt: skip
    write_atomically(folder / "README.md", card.encode())
    print(f"bundled {folder}: {figures['bits_per_dim_noisy']:.3f} bits/dim, accuracy {figures['bayes_accuracy']:.1%}")


if __name__ == "__main__":
    main()
