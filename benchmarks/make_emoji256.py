"""Write the 256 emoji that ship with the package: `python benchmarks/make_emoji256.py`.

They are of the training split, evenly spaced among the images of each class; classes 0 to 3 have 43 images, the others
42. `npm install --no-save emoji-datasource-google@16.0.0` fetches all images. The same package gives the same bytes.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np

from jacobiflow.data.emoji import EMOJI_CLASSES, EMOJI_FOLDER, emoji
from jacobiflow.files import write_atomically

TARGET = Path(__file__).parents[1] / "src" / "jacobiflow" / "data" / "emoji256.npz"
COUNT = 256


def main() -> None:
    """Select the images and write them beside the package's code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=EMOJI_FOLDER, help="of the npm package (%(default)s)")
    parser.add_argument("--out", type=Path, default=TARGET, help="archive to write (%(default)s)")
    arguments = parser.parse_args()

    data = emoji("train", arguments.folder)
    assert data.labels is not None
    labels, num_classes = data.labels.numpy(), len(EMOJI_CLASSES)
    spaced = []
    for c in range(num_classes):
        among = np.flatnonzero(labels == c)
        count = len(range(c, COUNT, num_classes))
        spaced.append(among[np.arange(count) * len(among) // count])
    chosen = np.sort(np.concatenate(spaced))
    archive = io.BytesIO()
    np.savez_compressed(archive, images=data.images[chosen].numpy(), labels=labels[chosen].astype(np.uint8))
    write_atomically(arguments.out, archive.getvalue())
    print(f"{arguments.out}: {len(chosen)} images, {arguments.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
