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
from jacobiflow.cli.options import guidance_words
from jacobiflow.data import ImageDataset, Noise, load_images
from jacobiflow.evaluation import bayes_accuracy, bits_per_dim
from jacobiflow.files import write_atomically, write_json
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.plots import image_grid, save_png

ROOT = Path(__file__).resolve().parent.parent
GUIDANCE = jf.Guidance(1.0)
BITS = {"gaussian": "bits_per_dim_noisy", "uniform": "bits_per_dim"}

CARD = """# {name}

A {kind} of {images} ({license}), class-conditional over {num_classes} classes. `jacobiflow.load("{name}")`.

| | |
| --- | --- |
| images | {size}x{size}, {in_channels} channel, in [-1, 1], {noise} |
| shape | {shape}, {parameters:,} parameters, float16, {megabytes:.1f} MB |
| training | `{command}`: {steps:,} steps in {hours} on {machine} |
| bits per dimension of {measured} images | {bpd:.3f} ({test_name}, {noise}, their labels) |
| class accuracy by Bayes' rule | {accuracy:.1%} ({accuracy_images:,} of them, the same noise) |
{setting}
{units}

Training loss (mean of 50 steps):

![loss curve](../../../../docs/figures/{name}-loss.png)

Samples, two a class: as drawn, and with guidance of weight 1 (annealed){denoised}.

![samples](../../../../docs/figures/{name}-samples.png)

Limits: {limits} Figures: docs/results/{name}.json, by `python benchmarks/bundle_model.py`.
"""
NOISY_UNITS = """\
Bits per dimension are in units of 8-bit pixels (-log2 p / D + log2 128) and belong to the *noisy* images that the
model was trained on; they do not compare with figures of dequantised images."""
DEQUANTISED_UNITS = """\
Bits per dimension are in units of 8-bit pixels (-log2 p / D + log2 128) of uniformly dequantised images: they bound the
code length of the 8-bit data from above."""


def noise_of(flow: ImageFlow) -> Noise:
    """The noise of the flow's training."""
    return Noise("gaussian", flow.config.noise_std) if flow.config.noise_std else Noise("uniform")


def shape_of(flow: ImageFlow) -> str:
    """The flow's shape, for the card."""
    config = flow.config
    size = f"(T = {config.num_tokens}, C = {config.token_channels}), {config.num_blocks} blocks x"
    if isinstance(config, jf.TarFlowConfig):
        return f"patch {config.patch_size} {size} {config.layers_per_block} layers x {config.channels} channels"
    if isinstance(config, jf.MAFConfig):
        return f"pixels {size} {config.hidden_layers} hidden layers x {config.hidden_features} units"
    raise ValueError(f"{type(flow).__name__}: no TarFlow or MAF")


def setting_of(name: str) -> str:
    """The card's row of the best setting for sampling, by search_guidance.py; nothing for a model that has none."""
    path = ROOT / "docs" / "results" / f"{name}-search.json"
    if not path.is_file():
        return ""
    result = json.loads(path.read_text())
    best = result["best"]
    plain = next(row for row in result["rows"] if row["weight"] == row["denoise"] == 0)
    guidance = jf.Guidance(best["weight"], attn_temperature=best["attn_temperature"]) if best["weight"] else None
    words = [*guidance_words(guidance), "--denoise", f"{best['denoise']:g}"]
    return (
        f"| best setting | `{' '.join(words)}`: fashion-FID {best['fashion_fid']:.3f} of {result['num']:,} samples, "
        f"{plain['fashion_fid']:.3f} as drawn (docs/evaluation.md) |\n"
    )


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


def draw_pictures(flow: ImageFlow, name: str, metrics: list[dict[str, float]]) -> None:
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
    guided = jf.sample(flow, num=20, labels=labels, seed=0, guidance=GUIDANCE, denoise=float(flow.config.noise_std > 0))
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
    jf.load(arguments.run).save_pretrained(folder, dtype=torch.float16)
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
    noise, bits = noise_of(flow), figures[BITS[noise_of(flow).kind]]
    gaussian, seconds = noise.kind == "gaussian", figures["training_seconds"]
    card = CARD.format(
        name=arguments.name, kind=type(flow).__name__, images=arguments.images_name, license=arguments.license,
        num_classes=config.num_classes, size=config.image_size, in_channels=config.in_channels,
        noise=f"Gaussian noise of standard deviation {noise.std}" if gaussian else "uniformly dequantised",
        shape=shape_of(flow), parameters=figures["parameters"], megabytes=figures["bytes"] / 1e6,
        command=arguments.command, steps=figures["steps"],
        hours=f"{seconds / 3600:.2f} h" if seconds >= 360 else f"{seconds:.0f} s", machine=arguments.machine,
        measured="noisy" if gaussian else "dequantised", bpd=bits, test_name=arguments.test_name,
        setting=setting_of(arguments.name), accuracy=figures["bayes_accuracy"],
        accuracy_images=figures["accuracy_images"],
        units=NOISY_UNITS if gaussian else DEQUANTISED_UNITS,
        denoised=" and one denoising step" if gaussian else "", limits=arguments.limits,
    )  # fmt: skip
    write_atomically(folder / "README.md", card.encode())
    print(f"bundled {folder}: {bits:.3f} bits/dim, accuracy {figures['bayes_accuracy']:.1%}")


if __name__ == "__main__":
    main()
