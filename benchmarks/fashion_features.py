"""Trains the features of fashion-FID: `python benchmarks/fashion_features.py`.

Needs Debian's dataset-fashion-mnist, and a quarter of an hour on two cores. Writes the weights and the statistics of
the 60,000 training images into src/jacobiflow/evaluation, and docs/results/fashion-features.json.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress
from safetensors.torch import save
from torch import Tensor

from jacobiflow.data import fashion_mnist
from jacobiflow.evaluation import FashionFeatures, Statistics, extract, frechet_distance
from jacobiflow.evaluation.fashion import STATISTICS, WEIGHTS
from jacobiflow.files import write_atomically, write_json
from jacobiflow.measuring import machine

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "src" / "jacobiflow" / "evaluation"
BATCH, RATE, SHIFT = 128, 4e-3, 2


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images moved by up to two pixels each way, half of them mirrored."""
    n, _, height, width = images.shape
    padded = F.pad(images, (SHIFT,) * 4)
    down, right = torch.randint(0, 2 * SHIFT + 1, (2, n), generator=generator)
    rows = down.view(n, 1, 1) + torch.arange(height).view(1, height, 1)
    columns = right.view(n, 1, 1) + torch.arange(width).view(1, 1, width)
    moved = padded[torch.arange(n).view(n, 1, 1), 0, rows, columns].unsqueeze(1)
    mirrored = torch.rand(n, generator=generator) < 0.5
    return torch.where(mirrored.view(n, 1, 1, 1), moved.flip(-1), moved)


def accuracy(network: FashionFeatures, images: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is their class."""
    with torch.no_grad():
        found = torch.cat([network.classify(part).argmax(dim=1) for part in images.split(500)])
    return float((found == labels).double().mean())


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    epochs = parser.parse_args().epochs
    train, test = fashion_mnist("train"), fashion_mnist("test")
    if train.labels is None or test.labels is None:
        raise ValueError("the data set has no labels")
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = FashionFeatures()
    steps = epochs * (len(train) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    started = time.perf_counter()
    with Progress() as bar:
        task = bar.add_task("training", total=steps)
        for epoch in range(epochs):
            network.convolutions.train()
            order = torch.randperm(len(train), generator=generator)
            for index in order[: len(order) // BATCH * BATCH].split(BATCH):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    logits = network.classify(augmented(train.images[index], generator))
                F.cross_entropy(logits.float(), train.labels[index], label_smoothing=0.05).backward()
                optimizer.step()
                schedule.step()
                bar.advance(task)
            network.eval()
            print(f"epoch {epoch + 1}: test accuracy {accuracy(network, test.images, test.labels):.4f}", flush=True)
    data = save({name: value.contiguous() for name, value in network.state_dict().items()})
    write_atomically(FOLDER / WEIGHTS, data)
    features = extract(network, [train.images])
    real = Statistics.of(features)
    real.save(FOLDER / STATISTICS)
    figures = {
        "epochs": epochs, "seconds": time.perf_counter() - started, "bytes": len(data),
        "parameters": sum(p.numel() for p in network.parameters()), "features": network.num_features,
        "distance_of_test_images": frechet_distance(real, Statistics.of(extract(network, [test.images]))),
        "distance_of_2000_training_images": frechet_distance(real, Statistics.of(features[:2000])),
        "test_accuracy": accuracy(network, test.images, test.labels), "machine": machine(),
    }  # fmt: skip
    write_json(ROOT / "docs" / "results" / "fashion-features.json", figures)
    print(f"test accuracy {figures['test_accuracy']:.2%}, {len(data) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
