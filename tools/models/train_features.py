"""Trains the features of fashion-FID or emoji-FID: `python -m tools.models.train_features fashion|emoji`.

fashion needs Debian's dataset-fashion-mnist, and a quarter of an hour on two cores; emoji needs `make emoji`, and two
minutes. Writes weights and statistics of all training images into benchmarks/weights, and
docs/results/KIND-features.json, which fills docs/evaluation.md and docs/paper.md. Emoji's accuracy is the share of test
images whose nearest training image is of their class.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save

from benchmarks import RESULTS
from benchmarks.features import ConvolutionalFeatures, statistics_file, weights_file
from benchmarks.lib.results import parser
from jacobiflow.data import ImageDataset, Split, load_images
from jacobiflow.evaluation import FeatureStatistics, extract_features, frechet_distance
from jacobiflow.training import image_transform
from jacobiflow.utils.files import write_atomically, write_json
from jacobiflow.utils.timing import describe_machine
from tools.models.make_images import emoji, labels_of

BATCH, RATE = 128, 4e-3


def classified(network: ConvolutionalFeatures, _: ImageDataset, test: ImageDataset) -> float:
    """Share of test images whose largest output is their class."""
    with torch.no_grad():
        classes = torch.cat([network.output(network(part)).argmax(dim=1) for part in test.images[:].split(500)])
    return float((classes == labels_of(test)).double().mean())


def nearest(network: ConvolutionalFeatures, train: ImageDataset, test: ImageDataset) -> float:
    """Share of test images whose nearest training image, by the angle between features, is of their class."""
    train_features, test_features = (F.normalize(extract_features(network, data.images[:])) for data in (train, test))
    return float(
        (labels_of(train)[(test_features @ train_features.T).argmax(dim=1)] == labels_of(test)).double().mean()
    )


class Recipe(NamedTuple):
    """The training of a kind; with `instances` each image is a class."""

    read: Callable[[Split], ImageDataset]
    epochs: int
    transform: Callable[[torch.Tensor], torch.Tensor]
    instances: bool
    accuracy: Callable[[ConvolutionalFeatures, ImageDataset, ImageDataset], float]


RECIPES = {
    "fashion": Recipe(
        partial(load_images, "fashion-mnist", 28, 1),
        12,
        image_transform((1, 28, 28), horizontal_flip=True, translate=2),
        False,
        classified,
    ),
    "emoji": Recipe(emoji, 40, image_transform((3, 32, 32), horizontal_flip=True, translate=3, hue=10), True, nearest),
}


def fit(kind: str, recipe: Recipe, train: ImageDataset, test: ImageDataset) -> ConvolutionalFeatures:
    """Trains a network; prints its accuracy ten times."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = ConvolutionalFeatures(kind)
    classes = torch.arange(len(train)) if recipe.instances else labels_of(train)
    per_epoch = len(train) // BATCH
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=recipe.epochs * per_epoch)
    for epoch in range(1, recipe.epochs + 1):
        network.train()
        order = torch.randperm(len(train), generator=generator)
        for index in order[: per_epoch * BATCH].split(BATCH):
            images = torch.stack([recipe.transform(image) for image in train.images[index]])
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                logits = network.output(network(images))
            F.cross_entropy(logits.float(), classes[index], label_smoothing=0.05).backward()
            optimizer.step()
            schedule.step()
        network.eval()
        if epoch % max(recipe.epochs // 10, 1) == 0:
            print(f"epoch {epoch}: accuracy {recipe.accuracy(network, train, test):.4f}", flush=True)
    return network


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("kind", choices=tuple(RECIPES))
    kind = arguments.parse_args().kind
    recipe = RECIPES[kind]
    train, test = recipe.read("train"), recipe.read("test")
    started = perf_counter()
    network = fit(kind, recipe, train, test)
    data = save({name: value.contiguous() for name, value in network.state_dict().items()})
    write_atomically(weights_file(kind), data)
    features = extract_features(network, train.images[:])
    real, unseen = (
        FeatureStatistics.from_features(each) for each in (features, extract_features(network, test.images[:]))
    )
    real.save(statistics_file(kind))
    generator = torch.Generator().manual_seed(0)
    half = features[torch.randperm(len(features), generator=generator)[: min(2000, len(features) // 2)]]
    metrics = {
        "command": "python -m tools.models.train_features", "epochs": recipe.epochs,
        "seconds": perf_counter() - started, "bytes": len(data),
        "parameters": sum(p.numel() for p in network.parameters()), "features": network.num_features,
        "distance_of_test_images": frechet_distance(real, unseen),
        f"distance_of_{len(half)}_training_images": frechet_distance(real, FeatureStatistics.from_features(half)),
        "test_accuracy": recipe.accuracy(network, train, test), "machine": describe_machine(),
    }  # fmt: skip
    write_json(RESULTS / f"{kind}-features.json", metrics)
    print(f"test accuracy {metrics['test_accuracy']:.2%}, {len(data) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
