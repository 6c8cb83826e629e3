"""Images by name, and from files and folders: the right pixels in order, and a broken file is named."""

from __future__ import annotations

import gzip
import io
import math
import struct
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from jacobiflow.data import DataError, available_splits, digits, load_images

Bytes = NDArray[np.uint8]


def random_bytes(*shape: int) -> Bytes:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_bundled_images_and_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size, channels, counts in (
        ("fashion-512", 28, 1, [52, 52] + [51] * 8), ("emoji-256", 32, 3, [43] * 4 + [42] * 2),
    ):  # fmt: skip
        data = load_images(name, size, channels)
        assert len(data.images.flatten(1).unique(dim=0)) == sum(counts)
        assert data.labels is not None and data.labels.bincount().tolist() == counts
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
    with pytest.raises(DataError, match=r"^digits: images are 1x8x8, not 3x32x32; give other images"):
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
    assert np.array_equal(load_images(str(file), 4, 3).images, colour)
    broken: list[dict[str, Any]] = [
        {"labels": np.zeros(5)}, {"images": colour / 255}, {"images": colour, "labels": np.zeros(5)},
        {"images": colour, "labels": np.zeros(4, int)}, {"images": np.array([None], object)},
    ]  # fmt: skip
    for arrays in broken:
        np.savez(file, **arrays)
        with pytest.raises(DataError, match=f"^{file}: "):
            load_images(str(file), 4, 3)
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"/some.npz: no .npz file with images and labels"):
        load_images(str(file), 4, 3)


def test_a_source_without_test_images_has_no_test_split(tmp_path: Path) -> None:
    np.savez(tmp_path / "some.npz", images=random_bytes(2, 8, 8))
    write_image(tmp_path / "photos" / "0.png", random_bytes(8, 8))
    write_idx(tmp_path / "idx", random_bytes(2, 8, 8), [0, 1])
    for source, size, splits in (
        ("digits", 8, ()), (f"{tmp_path}/some.npz", 8, ()), (f"{tmp_path}/photos", 8, ()),
        ("fashion-512", 28, ("train",)), (f"{tmp_path}/idx", 8, ("train",)),
    ):  # fmt: skip
        assert available_splits(source) == splits
        load_images(source, size, 1)
        with pytest.raises(DataError, match=f"^{source}: has no test split; give split='train', or "):
            load_images(source, size, 1, "test")
    write_idx(tmp_path / "idx", random_bytes(2, 8, 8), [0, 1], "t10k")
    assert available_splits(f"{tmp_path}/idx") == available_splits("fashion-mnist") == ("train", "test")


def idx_bytes(array: Bytes) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder: Path, images: Bytes, labels: list[int], stem: str = "train") -> None:
    """Images gzipped, and labels not."""
    folder.mkdir(exist_ok=True)
    (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
    (folder / f"{stem}-labels-idx1-ubyte").write_bytes(idx_bytes(np.array(labels, np.uint8)))


def test_a_folder_of_idx_files(tmp_path: Path) -> None:
    images, labels = random_bytes(5, 28, 28), [9, 0, 3, 3, 1]
    write_idx(tmp_path, images, labels, "t10k")
    data = load_images(str(tmp_path), 28, 1, "test")
    assert np.array_equal(data.images[:, 0], images)
    assert data.labels is not None and data.labels.tolist() == labels
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\[.gz\]: missing "):
        load_images(str(tmp_path), 28, 1, "train")
    write_idx(tmp_path, random_bytes(5, 4, 4), [0] * 4)
    with pytest.raises(DataError, match=f"^{tmp_path}: "):
        load_images(str(tmp_path))
    whole = idx_bytes(images)
    for content in (b"\0\0\x08", b"text", b"\0\0\x0d" + whole[3:], whole[:-1]):
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
        with pytest.raises(DataError, match=f"^{tmp_path}/train-images-idx3-ubyte.*: broken .*; fetch the file again"):
            load_images(str(tmp_path))


def write_image(path: Path, pixels: Bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def test_a_class_for_each_subfolder_in_order_of_name(tmp_path: Path) -> None:
    folder, elsewhere, pixels = tmp_path / "images", tmp_path / "elsewhere", random_bytes(6, 4, 4, 3)
    write_image(folder / "b" / "2.png", pixels[2])
    write_image(folder / "b" / "1.PNG", pixels[1])
    write_image(folder / "a" / "0.png", pixels[0])
    write_image(folder / "b" / "inner" / "0.bmp", pixels[3])
    write_image(elsewhere / "x.png", pixels[4])
    (folder / "c").symlink_to(elsewhere, target_is_directory=True)
    (folder / "a" / "1.png").symlink_to(write_image(tmp_path / "y.png", pixels[5]))
    write_image(folder / ".cache" / "0.png", pixels[0])
    (folder / "a" / "._0.png").write_bytes(b"\0\5\x16\7")
    (folder / "a" / "readme.txt").write_text("not an image")
    data = load_images(str(folder), 4)
    assert data.classes == ("a", "b", "c")
    assert data.labels is not None and data.labels.tolist() == [0, 0, 1, 1, 1, 2]
    assert np.array_equal(data.images[:].permute(0, 2, 3, 1), pixels[[0, 5, 1, 2, 3, 4]])
    (folder / "b" / "inner" / "0.bmp").unlink()
    flat = load_images(str(folder / "b"), 4)  # a folder without classes
    assert (flat.labels, flat.classes) == (None, ())
    assert np.array_equal(flat.images[:].permute(0, 2, 3, 1), pixels[1:3])


def test_size_and_colour(tmp_path: Path) -> None:
    """The shorter side is resized, and the centre cropped."""
    wide, tall = random_bytes(7, 10), random_bytes(31, 8)
    write_image(tmp_path / "0.png", wide)
    write_image(tmp_path / "1.png", tall)
    resized = np.asarray(Image.fromarray(tall).resize((7, 27), Image.Resampling.BICUBIC))
    assert np.array_equal(load_images(str(tmp_path), 7, 1).images[:][:, 0], [wide[:, 1:8], resized[10:17]])
    assert load_images(str(tmp_path)).images.shape == (2, 1, 7, 7)
    write_image(tmp_path / "2.png", random_bytes(18, 18, 3))
    assert load_images(str(tmp_path)).images.shape == (3, 3, 7, 7)
    assert load_images(str(tmp_path), 5, 1).images.shape == (3, 1, 5, 5)
    assert load_images("fashion-512").images.shape == (512, 1, 28, 28)
    assert load_images("fashion-512").classes[9] == "ankle-boot"
    exif, turned = Image.Exif(), random_bytes(9, 7)
    exif[0x0112] = 6  # Orientation: the camera was turned to the left.
    (tmp_path / "turned").mkdir()
    Image.fromarray(turned).save(tmp_path / "turned" / "0.png", exif=exif)
    assert np.array_equal(load_images(str(tmp_path / "turned")).images[0][0], np.rot90(turned, -1)[:, 1:8])


def test_every_mode_becomes_grey_or_colour(tmp_path: Path) -> None:
    grey, colour, clear = random_bytes(16, 16), random_bytes(16, 16, 3), random_bytes(16, 16, 4)
    clear[..., 3] = 51
    for i, pixels in enumerate((grey, colour, clear)):
        write_image(tmp_path / f"{i}.png", pixels)
    images = load_images(str(tmp_path), 16).images[:].permute(0, 2, 3, 1).numpy()
    assert np.array_equal(images[0], np.repeat(grey[..., None], 3, -1))
    assert np.array_equal(images[1], colour)
    assert np.abs(images[2] - (0.2 * clear[..., :3] + 0.8 * 255)).max() <= 1  # blended onto white
    single = load_images(str(tmp_path), 16, 1).images[:][:, 0].double().numpy()
    assert np.abs(single[1] - colour @ [0.299, 0.587, 0.114]).max() < 1


def test_errors_name_the_file(tmp_path: Path) -> None:
    cut = io.BytesIO()
    Image.fromarray(random_bytes(32, 32, 3)).save(cut, "JPEG")
    cases: list[tuple[Any, str, str]] = [  # a file's content or a function that makes it, its path, the message
        (b"", "a.txt", r"no image in it \(looked for .bmp, .*\)"),
        (cut.getvalue()[:-200], "a.jpg", r"/a.jpg: not a usable image \(.*truncated.*\); replace it, or remove"),
        (b"text", "a.png", r"/a.png: not a usable image \(cannot identify"),
        (lambda path: Image.fromarray(np.zeros((8, 8), np.uint16)).save(path), "a.png", "more than 8 bits per value"),
        (lambda path: write_image(path, random_bytes(7, 20)), "0.png", "/0.png: 20x7 pixels, smaller than 8x8; remove"),
        (lambda path: path.symlink_to("missing"), "lost.png", "/lost.png: not a usable image .*No such file"),
        (lambda path: write_image(path, random_bytes(8, 8)), "0.png", "0.png lies beside class folders; move it"),
    ]
    for i, (content, name, message) in enumerate(cases):
        folder = tmp_path / str(i)
        (folder / name).parent.mkdir(parents=True)
        content(folder / name) if callable(content) else (folder / name).write_bytes(content)
        if "class folders" in message:
            write_image(folder / "a" / "0.png", random_bytes(8, 8))
        with pytest.raises(DataError, match=message) as caught:
            load_images(str(folder), 8)
        assert str(folder) in str(caught.value)
    write_image(tmp_path / "a" / "0.png", random_bytes(8, 8))
    for name, size, channels, message in (
        (".", 8, 2, "channels=2: give 1 or 3"),
        ("a", 1_000_000, 3, r"0\.png: 8x8 pixels, smaller than 1000000x1000000"),  # 3 TB are not allocated first
    ):
        with pytest.raises(ValueError, match=message):
            load_images(str(tmp_path / name), size, channels)
