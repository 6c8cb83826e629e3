"""Write the real images that ship with the package: `python benchmarks/make_images.py fashion|emoji`.

`fashion512.npz` has the first training images of each class of Fashion-MNIST (Debian's dataset-fashion-mnist), in the
order of the training file. `emoji256.npz` has training images of `emoji` (`make emoji` fetches them), evenly spaced
among those of each class: skin tones of one emoji are neighbours. All classes have as many, or one fewer. The same data
gives the same bytes (an archive holds no dates).
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jacobiflow.data import ImageDataset, emoji, fashion_mnist
from jacobiflow.files import write_atomically

FOLDER = Path(__file__).parents[1] / "src" / "jacobiflow" / "data"
Indices = NDArray[np.int64]


class Recipe(NamedTuple):
    """Where images come from, how many ship, and which of those of a class, given how many."""

    read: Callable[[], ImageDataset]
    num: int
    among: Callable[[Indices, int], Indices]


RECIPES = {
    "fashion": Recipe(fashion_mnist, 512, lambda of_class, count: of_class[:count]),
    "emoji": Recipe(emoji, 256, lambda of_class, count: of_class[np.arange(count) * len(of_class) // count]),
}


def main() -> None:
    """Select the images and write them beside the package's code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=tuple(RECIPES))
    name = parser.parse_args().name
    recipe = RECIPES[name]
    data = recipe.read()
    assert data.labels is not None
    labels, classes = data.labels.numpy(), len(data.classes)
    chosen = np.sort(np.concatenate([
        recipe.among(np.flatnonzero(labels == c), len(range(c, recipe.num, classes))) for c in range(classes)
    ]))  # fmt: skip
    images = data.images[chosen].numpy()
    archive, out = io.BytesIO(), FOLDER / f"{name}{recipe.num}.npz"
    grey = images.shape[1] == 1
    np.savez_compressed(archive, images=images[:, 0] if grey else images, labels=labels[chosen].astype(np.uint8))
    write_atomically(out, archive.getvalue())
    print(f"{out}: {len(chosen)} images, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
