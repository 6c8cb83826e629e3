"""Images by name, from .npz files and from IDX files: each reads back, and a broken file is named."""

from __future__ import annotations

import gzip
import math
import struct
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from jacobiflow.data import DataError, digits, idx_folder, load_images

Bytes = NDArray[np.uint8]


def random_bytes(*shape: int) -> Bytes:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_bundled_images_and_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    fashion, emoji = load_images("fashion-512", 28, 1), load_images("emoji-256", 32, 3, "test")
    assert len(fashion.images.flatten(1).unique(dim=0)) == 512
    assert len(emoji.images.flatten(1).unique(dim=0)) == 256
    assert fashion.labels is not None and fashion.labels.bincount().tolist() == [52, 52] + [51] * 8
    assert emoji.labels is not None and emoji.labels.bincount().tolist() == [43] * 4 + [42] * 2
    license = resources.files("jacobiflow.data") / "FASHION_MNIST_LICENSE"
    assert "Copyright (c) 2017 Zalando SE" in license.read_text()
    data = load_images("digits", 8, 1)
    assert data.images.unique().tolist() == [math.floor(k * 255 / 16 + 0.5) for k in range(17)]
    assert data.labels is not None and data.labels.unique().tolist() == list(range(10))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="digits: needs scikit-learn; pip install"):
        digits()


def test_sources_that_do_not_exist_or_do_not_fit_are_refused(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"^digits: images are 1x8x8, the flow takes 3x32x32; give other images"):
        load_images("digits", 32, 3)
    for source in ("fashion", "", str(tmp_path / "missing"), str(tmp_path / "0.png")):
        with pytest.raises(DataError, match=f"^{source}: neither an .npz file, a folder, nor one of fash"):
            load_images(source, 28, 1)


def test_npz_files(tmp_path: Path) -> None:
    file, grey, colour = tmp_path / "some.npz", random_bytes(5, 4, 4), random_bytes(5, 3, 4, 4)
    np.savez_compressed(file, images=grey, labels=np.array([0, 2, 1, 2, 0], np.uint8))
    data = load_images(str(file), 4, 1)
    assert np.array_equal(data.images[:, 0], grey)
    assert data.labels is not None and data.labels.tolist() == [0, 2, 1, 2, 0]
    np.savez(file, images=colour)
    data = load_images(str(file), 4, 3)
    assert np.array_equal(data.images, colour) and data.labels is None
    broken: list[dict[str, Any]] = [
        {"labels": np.zeros(5)}, {"images": colour / 255}, {"images": colour, "labels": np.zeros(5)},
        {"images": colour, "labels": np.zeros(4, int)}, {"images": np.array([None], object)},
    ]  # fmt: skip
    for arrays in broken:
        np.savez(file, **arrays)
        with pytest.raises(DataError, match=f"^{file}: "):
            load_images(str(file), 4, 3)
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(DataError, match=f"^{file}: no .npz file with images and labels"):
        load_images(str(file), 4, 3)


def idx_bytes(array: Bytes) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder: Path, images: Bytes, labels: list[int], stem: str = "train") -> None:
    """Images gzipped, and labels not."""
    (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
    (folder / f"{stem}-labels-idx1-ubyte").write_bytes(idx_bytes(np.array(labels, np.uint8)))


def test_a_folder_of_idx_files(tmp_path: Path) -> None:
    images, labels = random_bytes(5, 28, 28), [9, 0, 3, 3, 1]
    write_idx(tmp_path, images, labels, "t10k")
    data = load_images(str(tmp_path), 28, 1, "test")
    assert np.array_equal(data.images[:, 0], images)
    assert data.labels is not None and data.labels.tolist() == labels
    with pytest.raises(DataError, match=r"no train-images-idx3-ubyte\[.gz\] "):
        idx_folder(tmp_path, "train")
    for shape, wrong in (((5, 4, 4), [0] * 4), ((5, 16), [0] * 5)):
        write_idx(tmp_path, random_bytes(*shape), wrong)
        with pytest.raises(DataError, match=f"^{tmp_path}: "):
            idx_folder(tmp_path)


@st.composite
def idx_files(draw: st.DrawFn) -> tuple[bytes, Bytes | None]:
    """Any bytes; or the IDX file of images, perhaps gzipped: with the images, or damaged."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=64)), None
    array = draw(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=3, max_dims=3, max_side=5)))
    content = bytearray(gzip.compress(idx_bytes(array), mtime=0) if draw(st.booleans()) else idx_bytes(array))
    if draw(st.booleans()):
        return bytes(content), array
    content[draw(st.integers(0, min(len(content), 32) - 1))] ^= draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(0, len(content)))]), None


@settings(deadline=None, max_examples=100)
@given(file=idx_files())
@example((b"\0\0\x08", None))
@example((b"\0\0\x08\xff" + bytes(4 * 255), None))  # more axes than NumPy has
@example((b"\0\0\x08\x02" + b"\x80\0\0\0" * 2, None))  # 2^62 bytes
@example((b"\x1f\x8b\x08\x00" + bytes(6) + b"\xff" * 8, None))  # zlib.error
def test_idx_files_are_read_and_damaged_ones_refused(
    tmp_path_factory: pytest.TempPathFactory, file: tuple[bytes, Bytes | None]
) -> None:
    content, array = file
    folder = tmp_path_factory.mktemp("idx")
    write_idx(folder, random_bytes(1, 1, 1), [0] * (1 if array is None else len(array)))
    (folder / "train-images-idx3-ubyte.gz").write_bytes(content)
    try:
        data = idx_folder(folder)
    except DataError as error:
        assert array is None and str(folder) in str(error)
    else:  # damage may be harmless
        assert array is None or torch.equal(data.images[:, 0], torch.from_numpy(array))
