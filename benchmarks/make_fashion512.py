"""Write the 512 Fashion-MNIST training images that ship with the package: `python benchmarks/make_fashion512.py`.

They are the first ones of each class, in the order of the training file; classes 0 and 1 have 52 images, the others
51. The same Fashion-MNIST gives the same bytes (the archive holds no dates).
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np

from jacobiflow.data.sources import FASHION_MNIST_CLASSES, FASHION_MNIST_FOLDER, fashion_mnist
from jacobiflow.files import write_atomically

TARGET = Path(__file__).parents[1] / "src" / "jacobiflow" / "data" / "fashion512.npz"
COUNT = 512


def main() -> None:
    """Select the images and write them beside the package's code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FASHION_MNIST_FOLDER, help="of the IDX files (%(default)s)")
    parser.add_argument("--out", type=Path, default=TARGET, help="archive to write (%(default)s)")
    arguments = parser.parse_args()

    data = fashion_mnist("train", arguments.folder)
    assert data.labels is not None
    labels, num_classes = data.labels.numpy(), len(FASHION_MNIST_CLASSES)
    first = [np.flatnonzero(labels == c)[: len(range(c, COUNT, num_classes))] for c in range(num_classes)]
    chosen = np.sort(np.concatenate(first))
    archive = io.BytesIO()
    np.savez_compressed(archive, images=data.images[chosen, 0].numpy(), labels=labels[chosen].astype(np.uint8))
    write_atomically(arguments.out, archive.getvalue())
    print(f"{arguments.out}: {len(chosen)} images, {arguments.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
