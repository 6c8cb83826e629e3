"""Writes images as .npz files that `--images` reads: `python -m benchmarks.make_images fashion|emoji`.

For `fashion`, the 512 images that ship with the package: the first training images of each class of Fashion-MNIST
(Debian's dataset-fashion-mnist), in the order of the training file. For `emoji` (`make emoji` fetches them), the 256
images that ship with the package, evenly spaced among the training images of each class, since skin tones of one emoji
are neighbours; and out/emoji/train.npz and out/emoji/test.npz with all images. All classes have as many, or one fewer,
in what ships. The same data gives the same bytes (an archive holds no dates).
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.emoji_images import emoji
from jacobiflow.data import ImageDataset, load_images
from jacobiflow.files import write_atomically

ROOT = Path(__file__).parents[1]
PACKAGE, OUT = ROOT / "src" / "jacobiflow" / "data", ROOT / "out" / "emoji"
Indices = NDArray[np.int64]


class Recipe(NamedTuple):
    """The training images, how many ship, and a choice of `count` from the images of a class."""

    read: Callable[[], ImageDataset]
    num: int
    choose: Callable[[Indices, int], Indices]


RECIPES = {
    "fashion": Recipe(partial(load_images, "fashion-mnist", 28, 1), 512, lambda of_class, count: of_class[:count]),
    "emoji": Recipe(emoji, 256, lambda of_class, count: of_class[np.arange(count) * len(of_class) // count]),
}


def labels_of(data: ImageDataset) -> Tensor:
    """The labels of the images."""
    if data.labels is None:
        raise ValueError("the data set has no labels")
    return data.labels


def write_images(data: ImageDataset, out: Path) -> None:
    """Writes the images and their labels."""
    archive, images = io.BytesIO(), data.images.numpy()
    grey = images.shape[1] == 1
    np.savez_compressed(
        archive, images=images[:, 0] if grey else images, labels=labels_of(data).numpy().astype(np.uint8)
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, archive.getvalue())
    print(f"{out}: {len(data)} images, {out.stat().st_size} bytes")


def main() -> None:
    """Selects the images and writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=tuple(RECIPES))
    name = parser.parse_args().name
    recipe = RECIPES[name]
    data = recipe.read()
    labels = labels_of(data).numpy()
    classes = labels.max() + 1
    indices = np.sort(np.concatenate([
        recipe.choose(np.flatnonzero(labels == c), len(range(c, recipe.num, classes))) for c in range(classes)
    ]))  # fmt: skip
    index = torch.from_numpy(indices)
    write_images(ImageDataset(data.images[index], labels_of(data)[index]), PACKAGE / f"{name}{recipe.num}.npz")
    if name == "emoji":
        write_images(data, OUT / "train.npz")
        write_images(emoji("test"), OUT / "test.npz")


if __name__ == "__main__":
    main()
