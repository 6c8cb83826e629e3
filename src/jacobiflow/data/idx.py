"""IDX files, the format of MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import io
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from jacobiflow.data.dataset import DataError, ImageDataset, check_room

Split: TypeAlias = Literal["train", "test"]

_DEFLATED = 1100  # no byte of a gzip file stands for more
DIGIT_CLASSES = tuple("0123456789")


def read_idx(path: str | Path) -> NDArray[np.uint8]:
    """The array of unsigned bytes in an IDX file, plain or gzipped.

    **Raises** `DataError` where the file is not IDX, is not of unsigned bytes, does not hold what its header says, or
    has more than 10,000,000 entries along its first axis, or more than memory holds.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            # The first bytes decide, not the name: a browser may unpack a file and keep its name.
            size = os.fstat(file.fileno()).st_size
            if file.peek(2)[:2] == b"\x1f\x8b":
                return _parse_idx(path, gzip.GzipFile(fileobj=file), _DEFLATED * size)
            return _parse_idx(path, file, size)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: broken gzip data ({error}); fetch the file again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error


def _parse_idx(path: Path, file: io.BufferedIOBase, most: int) -> NDArray[np.uint8]:
    """The array in `file`, which holds no more than `most` bytes."""
    magic = file.read(4)
    if len(magic) < 4 or magic[:3] != b"\x00\x00\x08" or magic[3] > 8:
        start = magic.hex(" ") or "nothing"
        raise DataError(
            f"{path}: starts with {start}, not as an IDX file of unsigned bytes and rank 0 to 8; replace it"
        )
    rank = magic[3]
    sizes = file.read(4 * rank)
    if len(sizes) < 4 * rank:
        raise DataError(f"{path}: truncated inside its header of {4 + 4 * rank} bytes; fetch the file again")
    shape = struct.unpack(f">{rank}I", sizes)
    want, data = math.prod(shape), bytearray()
    if want > most:
        raise DataError(
            f"{path}: its header {shape} asks for {want} bytes, more than it can hold; fetch the file again"
        )
    check_room(path, *(shape or (1,)))
    while len(data) <= want and (chunk := file.read(1 << 20)):  # never allocates what only the header promises
        data += chunk
    if len(data) != want:
        have = f"{len(data)}" if len(data) < want else "more"
        raise DataError(f"{path}: its header {shape} asks for {want} bytes, it holds {have}; fetch the file again")
    try:
        return np.frombuffer(data, np.uint8).reshape(shape)
    except ValueError as error:
        raise DataError(f"{path}: no array has the shape in its header ({error}); fetch the file again") from error


def idx_folder(folder: str | Path, split: Split = "train", classes: tuple[str, ...] = DIGIT_CLASSES) -> ImageDataset:
    """MNIST, or a data set in the same files: `train-images-idx3-ubyte` and three others, gzipped or not.

    **Arguments:** `split` is "train" or "test", whose files are called `t10k-...`; `classes` are the names of labels 0,
    1, ...

    **Raises** `DataError` where a file is missing, broken, or disagrees with its partner or with `classes`.
    """
    stem = {"train": "train", "test": "t10k"}.get(split)
    if stem is None:
        raise DataError(f"split={split!r}: give 'train' or 'test'")
    image_file = _find(Path(folder), f"{stem}-images-idx3-ubyte")
    label_file = _find(Path(folder), f"{stem}-labels-idx1-ubyte")
    images, labels = read_idx(image_file), read_idx(label_file)
    if images.ndim != 3 or not images.size:
        raise DataError(f"{image_file}: shape {images.shape}; give a file of (count, height, width), none of them 0")
    if labels.shape != images.shape[:1]:
        have = f"shape {labels.shape}, but {image_file.name} holds {len(images)} images"
        raise DataError(f"{label_file}: {have}; fetch both files from one source")
    if labels.max() >= len(classes):
        raise DataError(f"{label_file}: has label {labels.max()}; give labels 0 to {len(classes) - 1}")
    return ImageDataset(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64)), classes)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if os.path.isfile(path):
            return path
    raise DataError(
        f"{folder}: no {name}[.gz]; give a readable folder of IDX files (Debian's dataset-fashion-mnist installs one)"
    )
