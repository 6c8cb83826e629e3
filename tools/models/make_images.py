"""Writes the images that ship with the package: `python -m tools.models.make_images fashion|emoji`.

For `fashion`, the first 512 training images of Fashion-MNIST (Debian's dataset-fashion-mnist), balanced over classes.
For `emoji`, 256 people, faces and hands of Google's Noto Emoji (Apache-2.0, from the npm package
emoji-datasource-google that `make emoji` fetches), evenly spaced in each class, since skin tones of one emoji are
neighbours; and out/emoji/*.npz with all images. The same data gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import ROOT
from benchmarks.lib.results import parser
from jacobiflow.data import ImageDataset, Split, load_images, read_image
from jacobiflow.utils.files import write_atomically

PACKAGE = Path("node_modules/emoji-datasource-google")
CLASSES = ("face", "person", "gesture", "profession", "fantasy", "hand")
# Classes of groups of emoji: their names, or how these begin.
GROUPS = {"person": 1, "person-gesture": 2, "person-role": 3, "person-fantasy": 4, "hands": 5, "hand-prop": 5}
PREFIXES = {"face-": 0, "hand-": 5}
NOT_FACES = "face-costume"  # a ghost, a robot
TEST_BYTES = 26  # of 256: a tenth of the emoji


def label_of(group: str) -> int | None:
    if group == NOT_FACES:
        return None
    by_prefix = (label for prefix, label in PREFIXES.items() if group.startswith(prefix))
    return GROUPS.get(group, next(by_prefix, None))


def emoji(split: Split = "train", package: Path = PACKAGE, size: int = 32) -> ImageDataset:
    """Emoji of people, faces and hands in all skin tones, on white, in the order of Unicode's chart.

    An emoji and its skin tones are in one split: the test split has those whose code points, as the index writes them,
    have a SHA-256 that begins with a byte below 26.
    """
    images, labels = [], []
    index = json.loads((package / "emoji.json").read_bytes())
    for entry in sorted(index, key=lambda entry: (entry["sort_order"], entry["unified"])):
        label, byte = label_of(entry["subcategory"]), hashlib.sha256(entry["unified"].encode()).digest()[0]
        if label is None or (byte < TEST_BYTES) != (split == "test"):
            continue
        for tone in (entry, *entry.get("skin_variations", {}).values()):
            if tone["has_img_google"]:
                images.append(read_image(package / "img" / "google" / "64" / tone["image"], size, 3))
                labels.append(label)
    return ImageDataset(torch.stack(images), torch.tensor(labels), CLASSES)


def labels_of(data: ImageDataset) -> Tensor:
    assert data.labels is not None
    return data.labels


def write_images(data: ImageDataset, out: Path) -> None:
    archive, images = io.BytesIO(), data.images[:].numpy()
    grey = images.shape[1] == 1
    np.savez_compressed(
        archive, images=images[:, 0] if grey else images, labels=labels_of(data).numpy().astype(np.uint8)
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, archive.getvalue())
    print(f"{out}: {len(data)} images, {out.stat().st_size} bytes")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("name", choices=("fashion", "emoji"))
    name = arguments.parse_args().name
    data, num = (load_images("fashion-mnist", 28, 1), 512) if name == "fashion" else (emoji(), 256)
    labels = labels_of(data)
    classes = int(labels.max()) + 1
    chosen = []
    for c in range(classes):
        members, count = torch.nonzero(labels == c).flatten(), len(range(c, num, classes))
        chosen.append(members[:count] if name == "fashion" else members[torch.arange(count) * len(members) // count])
    index = torch.cat(chosen).sort().values
    shipped = ROOT / "src" / "jacobiflow" / "data" / f"{name}{num}.npz"
    write_images(ImageDataset(data.images[index], labels[index]), shipped)
    if name == "emoji":
        write_images(data, ROOT / "out" / "emoji" / "train.npz")
        write_images(emoji("test"), ROOT / "out" / "emoji" / "test.npz")


if __name__ == "__main__":
    main()
