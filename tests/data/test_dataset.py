"""Datasets: every way in gives the right pixels, and every broken input one `DataError` that names it."""

from __future__ import annotations

import gzip
import io
import math
import os
import resource
import runpy
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image

from jacobiflow.data import dataset
from jacobiflow.data.dataset import (
    FASHION_MNIST_CLASSES,
    FASHION_MNIST_FOLDER,
    DataError,
    ImageDataset,
    balanced_labels,
    bundled_fashion,
    digits,
    fashion_mnist,
    image_folder,
    load_images,
    quantize,
    read_idx,
    scale,
)

relaxed = settings(deadline=None, max_examples=80)
byte_arrays = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file, written again for each of Hypothesis's examples."""
    return tmp_path_factory.mktemp("scratch") / "file"


def idx_bytes(array: NDArray[np.uint8]) -> bytes:
    """The IDX file of `array`."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    """Random pixels."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_image(path: Path, pixels: NDArray[np.uint8]) -> Path:
    """`pixels` as an image file, its folder made where missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


# ---------------------------------------------------------------------------------------------------------------- IDX


@relaxed
@given(array=byte_arrays, packed=st.booleans())
def test_idx_round_trips(scratch: Path, array: NDArray[np.uint8], packed: bool) -> None:
    scratch.write_bytes(gzip.compress(idx_bytes(array)) if packed else idx_bytes(array))
    read = read_idx(scratch)
    assert read.dtype == np.uint8
    assert read.shape == array.shape
    assert np.array_equal(read, array)


@relaxed
@given(array=byte_arrays, packed=st.booleans(), data=st.data())
def test_truncated_idx_is_refused(scratch: Path, array: NDArray[np.uint8], packed: bool, data: st.DataObject) -> None:
    content = gzip.compress(idx_bytes(array)) if packed else idx_bytes(array)
    scratch.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(DataError, match=str(scratch)):
        read_idx(scratch)


@relaxed
@given(array=byte_arrays, data=st.data(), flip=st.integers(1, 255))
def test_flipped_idx_header_is_refused_or_obeyed(
    scratch: Path, array: NDArray[np.uint8], data: st.DataObject, flip: int
) -> None:
    content = bytearray(idx_bytes(array))
    content[data.draw(st.integers(0, 3 + 4 * array.ndim))] ^= flip
    scratch.write_bytes(content)
    try:
        read = read_idx(scratch)
    except DataError as error:
        assert str(scratch) in str(error)
    else:  # the altered header happens to describe the file
        assert idx_bytes(read) == bytes(content)


@relaxed
@given(array=byte_arrays, data=st.data(), flip=st.integers(1, 255))
def test_flipped_gzip_is_refused_or_harmless(
    scratch: Path, array: NDArray[np.uint8], data: st.DataObject, flip: int
) -> None:
    content = bytearray(gzip.compress(idx_bytes(array)))
    content[data.draw(st.integers(0, len(content) - 1))] ^= flip
    scratch.write_bytes(content)
    try:
        read = read_idx(scratch)
    except DataError as error:
        assert str(scratch) in str(error)
    else:  # a date, say
        assert np.array_equal(read, array)


@relaxed
@given(content=st.binary(max_size=64))
@example(b"\0\0\x08\xff" + bytes(4 * 255))  # more axes than NumPy has
@example(b"\0\0\x08\x04" + bytes(4) + b"\xff" * 12)  # empty, but too large for an array's strides
@example(b"\0\0\x08\x02" + b"\x80\0\0\0" * 2)  # 2^62 bytes
@example(b"\x1f\x8b\x08\x00" + bytes(6) + b"\xff" * 8)  # zlib.error
def test_any_bytes_as_idx(scratch: Path, content: bytes) -> None:
    scratch.write_bytes(content)
    try:
        assert idx_bytes(read_idx(scratch)) == content
    except DataError as error:
        assert str(scratch) in str(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with nothing, not as an IDX file"),
        (b"\0\0\x0d\x01\0\0\0\0", "starts with 00 00 0d 01, not as an IDX file of unsigned bytes"),
        (b"\0\0\x08\x03\0\0", r"truncated inside its header of 16 bytes; fetch"),
        (idx_bytes(noise(3, 2))[:-1], r"header \(3, 2\) asks for 6 bytes, it holds 5; fetch"),
        (idx_bytes(noise(3, 2)) + b"!", r"header \(3, 2\) asks for 6 bytes, it holds more; fetch"),
        (b"\0\0\x08\x03" + b"\xff" * 12 + b"!", r"asks for 792\d+ bytes, it holds 1; fetch"),
        (gzip.compress(b"\0\0\x08\x02" + b"\x7f\0\0\0" * 2), r"asks for 45\d+ bytes, it holds 0; fetch"),
        (gzip.compress(idx_bytes(noise(3, 2)))[:-2], "broken gzip data .*; fetch"),
        (gzip.compress(idx_bytes(noise(3, 2)))[:10] + b"\xff" * 20, "broken gzip data .*; fetch"),
    ],
)
def test_idx_errors(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "some-idx"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"some-idx: .*{message}"):
        read_idx(path)


def test_idx_bomb_stays_packed(tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    path.write_bytes(gzip.compress(idx_bytes(noise(3)) + bytes(1 << 27)))
    read: list[int] = []
    with open(path, "rb") as file, gzip.GzipFile(fileobj=file) as unpacked:
        with pytest.raises(DataError, match="it holds more"):
            dataset._parse_idx(path, unpacked)
        read.append(unpacked.tell())
    assert read[0] < 1 << 22


def test_idx_without_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"gone: cannot be read .No such file or directory.; check the path"):
        read_idx(tmp_path / "gone")
    with pytest.raises(DataError, match="Is a directory"):
        read_idx(tmp_path)
    monkeypatch.setattr(dataset, "open", refuse, raising=False)
    with pytest.raises(
        DataError, match=r"locked: cannot be read .Permission denied.; check the path and its permissions"
    ):
        read_idx(tmp_path / "locked")


def refuse(path: str | Path, *_: object) -> None:
    """What the system says to someone without permission."""
    raise PermissionError(13, "Permission denied", str(path))


# ------------------------------------------------------------------------------------------------------ Fashion-MNIST


def write_idx_folder(folder: Path, images: NDArray[np.uint8], labels: NDArray[np.uint8], split: str = "train") -> Path:
    """`images` packed and `labels` plain, as both are allowed."""
    folder.mkdir(exist_ok=True)
    (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
    (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return folder


def test_idx_folder(tmp_path: Path) -> None:
    images, labels = noise(5, 28, 28), np.array([9, 0, 3, 3, 1], np.uint8)
    write_idx_folder(tmp_path, images, labels, "t10k")
    data = fashion_mnist("test", tmp_path)
    assert np.array_equal(data.images[:, 0], images)
    assert data.labels is not None
    assert data.labels.tolist() == labels.tolist()
    assert data.classes == FASHION_MNIST_CLASSES
    named = load_images(str(tmp_path), 28, 1, "test")
    assert torch.equal(named.images, data.images)
    assert named.classes == tuple("0123456789")  # it may be MNIST
    with pytest.raises(DataError, match=r"no train-images-idx3-ubyte\[.gz\]; install Debian's dataset-fashion-mnist"):
        fashion_mnist("train", tmp_path)
    with pytest.raises(DataError, match="split='valid': give 'train' or 'test'"):
        fashion_mnist("valid", tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            noise(5, 28, 28),
            np.zeros(4, np.uint8),
            r"labels-idx1-ubyte: shape \(4,\), but .* holds 5 images; fetch both",
        ),
        (noise(5, 28, 28), np.zeros((5, 1), np.uint8), r"labels-idx1-ubyte: shape \(5, 1\), but"),
        (noise(5, 784), np.zeros(5, np.uint8), r"images-idx3-ubyte.gz: shape \(5, 784\); give"),
        (
            noise(0, 28, 28),
            np.zeros(0, np.uint8),
            r"images-idx3-ubyte.gz: shape \(0, 28, 28\); give .*, none of them 0",
        ),
        (noise(5, 0, 28), np.zeros(5, np.uint8), r"images-idx3-ubyte.gz: shape \(5, 0, 28\); give"),
        (noise(2, 28, 28), np.array([0, 25], np.uint8), "labels-idx1-ubyte: has label 25; give labels 0 to 9"),
    ],
)
def test_idx_folder_errors(tmp_path: Path, images: NDArray[np.uint8], labels: NDArray[np.uint8], message: str) -> None:
    write_idx_folder(tmp_path, images, labels)
    with pytest.raises(DataError, match=message):
        fashion_mnist("train", tmp_path)


@pytest.fixture(scope="module")
def debian_train() -> ImageDataset:
    """The whole training set, where Debian's package is installed."""
    if not (FASHION_MNIST_FOLDER / "train-images-idx3-ubyte.gz").is_file():
        pytest.skip("needs Debian's dataset-fashion-mnist")
    return fashion_mnist("train")


def test_bundled_images() -> None:
    data = bundled_fashion()
    assert data.images.shape == (512, 1, 28, 28)
    assert data.labels is not None
    assert data.labels.bincount().tolist() == [52, 52] + [51] * 8
    assert data.classes == FASHION_MNIST_CLASSES
    assert len(data.images.flatten(1).unique(dim=0)) == 512
    package = Path(dataset.__file__).parent
    assert (package / "fashion512.npz").stat().st_size < 400_000
    assert "Copyright (c) 2017 Zalando SE" in (package / "FASHION_MNIST_LICENSE").read_text()
    with zipfile.ZipFile(package / "fashion512.npz") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_bundled_images_are_the_first_of_each_class(debian_train: ImageDataset) -> None:
    data, labels = bundled_fashion(), debian_train.labels
    assert data.labels is not None
    assert labels is not None
    seen = torch.zeros(10, dtype=torch.int64)
    rows = []
    for row, label in enumerate(labels.tolist()):
        if seen[label] < (52 if label < 2 else 51):
            rows.append(row)
            seen[label] += 1
        if len(rows) == 512:
            break
    assert torch.equal(data.images, debian_train.images[rows])
    assert torch.equal(data.labels, labels[rows])


def test_bundled_images_are_reproducible(
    debian_train: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "make_fashion512.py"
    outs = [tmp_path / "first.npz", tmp_path / "second.npz"]
    for out in outs:
        monkeypatch.setattr(sys, "argv", [str(script), "--out", str(out)])
        runpy.run_path(str(script), run_name="__main__")
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == outs
    with np.load(outs[0]) as made, np.load(Path(dataset.__file__).with_name("fashion512.npz")) as shipped:
        assert set(made) == set(shipped) == {"images", "labels"}
        assert all(np.array_equal(made[name], shipped[name]) and made[name].dtype == np.uint8 for name in made)


# -------------------------------------------------------------------------------------------------- folders of images


def test_classes_of_a_folder(tmp_path: Path) -> None:
    pixels = noise(6, 4, 4, 3)
    write_image(tmp_path / "b" / "2.png", pixels[2])
    write_image(tmp_path / "b" / "1.PNG", pixels[1])
    write_image(tmp_path / "a" / "0.png", pixels[0])
    write_image(tmp_path / "b" / "inner" / "0.bmp", pixels[3])
    (tmp_path / "a" / "readme.txt").write_text("not an image")
    (tmp_path / "list.csv").write_text("neither")
    (tmp_path / "b" / "link.csv").symlink_to(tmp_path / "list.csv")
    write_image(tmp_path / ".cache" / "0.png", pixels[0])
    (tmp_path / "a" / "._0.png").write_bytes(b"\0\5\x16\7")
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    write_image(elsewhere / "x.png", pixels[4])
    (tmp_path / "c").symlink_to(elsewhere, target_is_directory=True)
    (tmp_path / "a" / "1.png").symlink_to(write_image(elsewhere / "hidden" / "y.png", pixels[5]))
    data = image_folder(tmp_path, 4)
    assert data.classes == ("a", "b", "c")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert np.array_equal(data.images.permute(0, 2, 3, 1), pixels[[0, 5, 1, 2, 3, 4, 5]])


def test_folder_without_classes(tmp_path: Path) -> None:
    pixels = noise(3, 4, 4)
    for i, name in enumerate(("0.png", "1.png", "10.png")):
        write_image(tmp_path / name, pixels[i])
    (tmp_path / "notes").mkdir()
    data = load_images(str(tmp_path), 4, 1)
    assert data.labels is None
    assert data.classes == ()
    assert np.array_equal(data.images[:, 0], pixels)
    images, labels = data.batch(slice(1, 3))
    assert torch.equal(images, scale(data.images[1:]))
    assert labels is None


@pytest.mark.parametrize(("height", "width"), [(6, 6), (6, 9), (6, 10), (9, 6), (10, 6)])
@pytest.mark.parametrize("channels", [1, 3])
def test_centre_crop(tmp_path: Path, height: int, width: int, channels: int) -> None:
    pixels = noise(height, width, 3) if channels == 3 else noise(height, width)
    write_image(tmp_path / "0.png", pixels)
    top, left = (height - 6) // 2, (width - 6) // 2
    expected = pixels[top : top + 6, left : left + 6].reshape(6, 6, channels)
    assert np.array_equal(image_folder(tmp_path, 6, channels).images[0].permute(1, 2, 0), expected)


def bicubic(length: int, size: int) -> NDArray[np.float64]:
    """Weights (size, length) of bicubic resampling (a = -1/2), widened where it shrinks."""
    ratio = length / size
    x = np.abs((np.arange(length) + 0.5 - (np.arange(size)[:, None] + 0.5) * ratio) / ratio)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return np.asarray(weights / weights.sum(1, keepdims=True))


@pytest.mark.parametrize(("height", "width", "resized"), [(14, 14, (7, 7)), (13, 20, (7, 11)), (31, 8, (27, 7))])
def test_resizing(tmp_path: Path, height: int, width: int, resized: tuple[int, int]) -> None:
    pixels = noise(height, width)
    write_image(tmp_path / "0.png", pixels)
    rows = np.clip(np.rint(pixels @ bicubic(width, resized[1]).T), 0, 255)
    both = np.clip(np.rint(bicubic(height, resized[0]) @ rows), 0, 255)
    top, left = (resized[0] - 7) // 2, (resized[1] - 7) // 2
    found = image_folder(tmp_path, 7, 1).images[0, 0].double().numpy()
    assert np.abs(found - both[top : top + 7, left : left + 7]).max() <= 1  # Pillow's weights are fixed-point


def test_halving_a_plane_is_exact(tmp_path: Path) -> None:
    y, x = np.mgrid[:32, :48].astype(np.uint8)
    write_image(tmp_path / "0.png", 4 * y + 2 * x)
    y, x = np.mgrid[:16, :24]
    expected = 4 * (2 * y + 0.5) + 2 * (2 * x + 0.5)
    found = image_folder(tmp_path, 16, 1).images[0, 0].numpy()
    assert np.array_equal(found[3:-3], expected[3:-3, 4:20])


def test_greys_and_colours(tmp_path: Path) -> None:
    grey, colour = noise(4, 4), noise(4, 4, 3)
    write_image(tmp_path / "0.png", grey)
    write_image(tmp_path / "1.png", colour)
    images = image_folder(tmp_path, 4).images.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(images[0], np.repeat(grey[..., None], 3, -1))
    assert np.array_equal(images[1], colour)
    luma = image_folder(tmp_path, 4, 1).images[1, 0].double().numpy()
    assert np.abs(luma - colour @ [0.299, 0.587, 0.114]).max() < 1


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_png(tmp_path: Path, channels: int) -> None:
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for i, offset in enumerate((0, 128, -128)):  # all round to the same level
        Image.fromarray((levels.astype(np.int64) * 257 + offset).clip(0, 65535).astype(np.uint16)).save(
            tmp_path / f"{i}.png"
        )
    images = image_folder(tmp_path, 16, channels).images
    assert np.array_equal(images, np.broadcast_to(levels, (3, channels, 16, 16)))


def test_transparency(tmp_path: Path) -> None:
    pixels = noise(4, 4, 4)
    for name, alpha in (("0", 255), ("1", 0), ("2", 51)):
        pixels[..., 3] = alpha
        write_image(tmp_path / f"{name}.png", pixels)
    colour = pixels[..., :3]
    images = image_folder(tmp_path, 4).images.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(images[0], colour)
    assert np.all(images[1] == 255)
    assert np.abs(images[2] - (0.2 * colour + 0.8 * 255)).max() <= 1


def save_gif(path: Path, frames: int) -> None:
    """A GIF of that many frames."""
    first, *rest = (Image.fromarray(noise(8, 8, 3, seed=i)) for i in range(frames))
    first.save(path, save_all=True, append_images=rest)


def test_gif_of_one_frame(tmp_path: Path) -> None:
    save_gif(tmp_path / "0.gif", 1)
    with Image.open(tmp_path / "0.gif") as file:
        assert np.array_equal(image_folder(tmp_path, 8).images[0].permute(1, 2, 0), np.asarray(file.convert("RGB")))


def truncated_png(folder: Path) -> None:
    path = write_image(folder / "bad.png", noise(32, 32, 3))
    path.write_bytes(path.read_bytes()[:-200])


def truncated_jpeg(folder: Path) -> None:
    path = write_image(folder / "bad.jpg", noise(32, 32, 3))
    path.write_bytes(path.read_bytes()[:-200])


def empty_class(folder: Path) -> None:
    write_image(folder / "a" / "0.png", noise(8, 8))
    (folder / "b" / "inner").mkdir(parents=True)


def loose_image(folder: Path) -> None:
    write_image(folder / "a" / "0.png", noise(8, 8))
    write_image(folder / "loose.png", noise(8, 8))


def link_loop(folder: Path) -> None:
    write_image(folder / "a" / "0.png", noise(8, 8))
    (folder / "a" / "loop").symlink_to(folder, target_is_directory=True)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda folder: None, r"no image in it \(looked for .bmp, .*\)"),
        (lambda folder: (folder / "a").mkdir(), "no image in it"),
        (lambda folder: (folder / "a.txt").write_text(""), "no image in it"),
        (empty_class, "/b: class folder without an image; add some, or remove it"),
        (loose_image, "loose.png lies beside class folders; move it into one"),
        (truncated_png, r"/bad.png: not a usable image \(.*\); replace or remove it"),
        (truncated_jpeg, r"/bad.jpg: not a usable image \(.*truncated.*\); replace or remove it"),
        (lambda folder: (folder / "bad.png").write_bytes(b""), "/bad.png: not a usable image"),
        (lambda folder: (folder / "bad.png").write_text("text"), r"/bad.png: not a usable image \(cannot identify"),
        (lambda folder: save_gif(folder / "bad.gif", 3), "/bad.gif: not a usable image .an animation .* of 3 frames.;"),
        (lambda folder: Image.new("F", (8, 8)).save(folder / "bad.tif"), "/bad.tif: .*32-bit pixels"),
        (lambda folder: Image.new("I", (8, 8)).save(folder / "bad.tif"), "/bad.tif: .*32-bit pixels"),
        (
            lambda folder: write_image(folder / "bad.png", noise(7, 20)),
            "/bad.png: 20x7 pixels, smaller than 8x8; remove",
        ),
        (lambda folder: (folder / "bad.png").symlink_to("gone"), "/bad.png: neither a file nor a folder .*remove it"),
        (lambda folder: (folder / "lost").symlink_to("gone"), "/lost: neither a file nor a folder .*remove it"),
        (lambda folder: os.mkfifo(folder / "bad.png"), "/bad.png: neither a file nor a folder"),
        (link_loop, "Too many levels of symbolic links.; check its permissions and links"),
    ],
)
def test_image_folder_errors(tmp_path: Path, build: Callable[[Path], object], message: str) -> None:
    build(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        image_folder(tmp_path, 8)
    assert str(tmp_path) in str(caught.value)


def test_image_folder_arguments(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone: no such folder"):
        image_folder(tmp_path / "gone", 8)
    for size, channels in ((0, 3), (8, 2)):
        with pytest.raises(DataError, match=f"size={size}, channels={channels}: give"):
            image_folder(tmp_path, size, channels)


def test_images_without_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_image(tmp_path / "a" / "0.png", noise(8, 8))
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", refuse)
        with pytest.raises(DataError, match=f"{path}: not a usable image .*Permission denied"):
            image_folder(tmp_path, 8)
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: refuse(folder) if folder == path.parent else scandir(folder))
    with pytest.raises(DataError, match=f"{path.parent}: cannot be read .Permission denied.; check its permissions"):
        image_folder(tmp_path, 8)


def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "0.png", noise(8, 8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match=r"/0.png: not a usable image .*bomb"):
        image_folder(tmp_path, 8)


def test_large_folders_hold_no_files_open(tmp_path: Path) -> None:
    for i in range(40):
        write_image(tmp_path / str(i % 4) / f"{i}.png", noise(4, 4, seed=i))
    descriptor = os.dup(0)
    os.close(descriptor)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptor + 10, hard))
    try:
        assert len(image_folder(tmp_path, 4)) == 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.filterwarnings("ignore")  # of Pillow, on odd metadata
@relaxed
@given(format=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]), data=st.data())
def test_damaged_images_are_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, format: str, data: st.DataObject
) -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise(8, 8, 3)).save(buffer, format)
    content = bytearray(buffer.getvalue())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "0.png").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Image, "MAX_IMAGE_PIXELS", 1 << 20)
            assert image_folder(folder, 8).images.shape == (1, 3, 8, 8)
    except DataError as error:
        assert str(folder / "0.png") in str(error)


# ------------------------------------------------------------------------------------------------------- all the rest


def test_digits() -> None:
    data = digits()
    assert data.images.shape == (1797, 1, 8, 8)
    assert data.images.unique().tolist() == [math.floor(k * 255 / 16 + 0.5) for k in range(17)]
    assert data.labels is not None
    assert data.labels.unique().tolist() == list(range(10))
    assert data.classes == tuple("0123456789")
    images, labels = data.batch(torch.tensor([5, 3]))
    assert torch.equal(images, scale(data.images[[5, 3]]))
    assert labels is not None
    assert labels.tolist() == [5, 3]


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="digits: needs scikit-learn; pip install"):
        digits()


def test_all_levels_round_trip() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(quantize(scale(levels)), levels)
    torch.testing.assert_close(scale(levels), torch.linspace(-1, 1, 256))
    assert scale(levels)[[0, 255]].tolist() == [-1, 1]


@relaxed
@given(hnp.arrays(np.float32, hnp.array_shapes(max_side=4), elements=st.floats(-3, 3, width=32)))
def test_quantize_rounds_to_the_nearest_level(values: NDArray[np.float32]) -> None:
    images = torch.from_numpy(values)
    before = images.clone()
    levels = quantize(images)
    assert levels.dtype == torch.uint8
    assert torch.equal(images, before)
    assert (scale(levels) - images.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6
    assert torch.equal(quantize(scale(levels)), levels)
    assert torch.equal(quantize(images.double()), levels)


@given(st.integers(0, 50), st.integers(1, 12))
def test_balanced_labels(num: int, num_classes: int) -> None:
    assert balanced_labels(num, num_classes).tolist() == [i % num_classes for i in range(num)]


def test_balanced_labels_refuses() -> None:
    for num, num_classes in ((-1, 3), (4, 0)):
        with pytest.raises(DataError, match=f"num={num}, num_classes={num_classes}: give"):
            balanced_labels(num, num_classes)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 1, 4, 4), None, r"images: torch.float32 of shape \(2, 1, 4, 4\); give torch.uint8"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), None, r"images: torch.uint8 of shape \(2, 4, 4\); give"),
        (torch.zeros(0, 1, 4, 4, dtype=torch.uint8), None, "none of them 0"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), r"labels: .*of shape \(2,\)"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2), "labels: torch.float32 .*give torch.int64"),
    ],
)
def test_dataset_refuses(images: torch.Tensor, labels: torch.Tensor | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ImageDataset(images, labels)


def test_load_images_by_name(debian_train: ImageDataset) -> None:
    assert torch.equal(load_images("fashion-mnist", 28, 1).images, debian_train.images)


def test_load_images(tmp_path: Path) -> None:
    assert torch.equal(load_images("fashion-512", 28, 1).images, bundled_fashion().images)
    assert len(load_images("digits", 8, 1)) == 1797
    with pytest.raises(DataError, match="--images digits: images are 1x8x8, the flow takes 3x32x32; give other images"):
        load_images("digits", 32, 3)
    file = write_image(tmp_path / "0.png", noise(4, 4))
    for source in ("fashion", "", str(tmp_path / "gone"), str(file)):
        with pytest.raises(
            DataError, match=f"--images {source}: neither a folder nor one of fashion-512, fashion-mnist"
        ):
            load_images(source, 28, 1)
