"""Folders of images: the right pixels, in order, from every format; every broken file is named."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from jacobiflow.data import DataError, folder, image_folder


def noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_image(path: Path, pixels: NDArray[np.uint8]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def test_a_class_for_each_subfolder_in_order_of_name(tmp_path: Path) -> None:
    folder, elsewhere, pixels = tmp_path / "images", tmp_path / "elsewhere", noise(6, 4, 4, 3)
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
    data = image_folder(folder, 4)
    assert data.classes == ("a", "b", "c")
    assert data.labels is not None and data.labels.tolist() == [0, 0, 1, 1, 1, 2]
    assert np.array_equal(data.images.permute(0, 2, 3, 1), pixels[[0, 5, 1, 2, 3, 4]])
    (folder / "b" / "inner" / "0.bmp").unlink()
    flat = image_folder(folder / "b", 4)  # a folder without classes
    assert (flat.labels, flat.classes) == (None, ())
    assert np.array_equal(flat.images.permute(0, 2, 3, 1), pixels[1:3])


@pytest.mark.parametrize(("shape", "resized"), [((7, 10), (7, 10)), ((31, 8), (27, 7))])
def test_the_shorter_side_is_resized_and_the_centre_cropped(tmp_path: Path, shape: Any, resized: Any) -> None:
    pixels, (top, left) = noise(*shape), ((side - 7) // 2 for side in resized)
    write_image(tmp_path / "0.png", pixels)
    want = np.asarray(Image.fromarray(pixels).resize(resized[::-1], Image.Resampling.BICUBIC))
    image = image_folder(tmp_path, 7, 1).images[0, 0].numpy()
    assert np.array_equal(image, want[top : top + 7, left : left + 7])


def test_every_mode_becomes_grey_or_colour(tmp_path: Path) -> None:
    grey, colour, clear = noise(16, 16), noise(16, 16, 3), noise(16, 16, 4)
    clear[..., 3] = 51
    for i, pixels in enumerate((grey, colour, clear)):
        write_image(tmp_path / f"{i}.png", pixels)
    levels = np.arange(256).reshape(16, 16)
    for i, offset in enumerate((0, 128, -128)):  # 16-bit values that all round to the same level
        wide = (levels * 257 + offset).clip(0, 65535).astype(np.uint16)
        Image.fromarray(wide).save(tmp_path / f"{3 + i}.png")
    images = image_folder(tmp_path, 16).images.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(images[0], np.repeat(grey[..., None], 3, -1))
    assert np.array_equal(images[1], colour)
    assert np.abs(images[2] - (0.2 * clear[..., :3] + 0.8 * 255)).max() <= 1  # blended onto white
    assert np.array_equal(images[3:], np.broadcast_to(levels[..., None], (3, 16, 16, 3)))
    single = image_folder(tmp_path, 16, 1).images[:, 0].double().numpy()
    assert np.abs(single[1] - colour @ [0.299, 0.587, 0.114]).max() < 1
    assert np.array_equal(single[3:], np.broadcast_to(levels, (3, 16, 16)))


def test_errors_name_the_file(tmp_path: Path) -> None:
    cut, animation = io.BytesIO(), io.BytesIO()
    Image.fromarray(noise(32, 32, 3)).save(cut, "JPEG")
    frames = [Image.fromarray(noise(8, 8, 3, seed=i)) for i in range(3)]
    frames[0].save(animation, "GIF", save_all=True, append_images=frames[1:])
    cases: list[tuple[Any, str, str]] = [  # a file's content or a function that makes it, its path, the message
        (b"", "a.txt", r"no image in it \(looked for .bmp, .*\)"),
        (cut.getvalue()[:-200], "a.jpg", r"/a.jpg: not a usable image \(.*truncated.*\); replace or remove it"),
        (b"text", "a.png", r"/a.png: not a usable image \(cannot identify"),
        (animation.getvalue(), "a.gif", "/a.gif: not a usable image .an animation .* of 3 frames.;"),
        (lambda path: write_image(path, noise(7, 20)), "0.png", "/0.png: 20x7 pixels, smaller than 8x8; remove"),
        (lambda path: path.symlink_to("missing"), "lost.png", "/lost.png: not a usable image .*No such file"),
        (lambda path: path.mkdir(parents=True), "b/c", "/b: class folder without an image; add some, or remove it"),
        (lambda path: write_image(path, noise(8, 8)), "0.png", "0.png lies beside class folders; move it into one"),
    ]
    for i, (content, name, message) in enumerate(cases):
        folder = tmp_path / str(i)
        (folder / name).parent.mkdir(parents=True)
        content(folder / name) if callable(content) else (folder / name).write_bytes(content)
        if "b" in name.split("/") or "class folders" in message:
            write_image(folder / "a" / "0.png", noise(8, 8))
        with pytest.raises(DataError, match=message) as caught:
            image_folder(folder, 8)
        assert str(folder) in str(caught.value)
    write_image(tmp_path / "a" / "0.png", noise(8, 8))
    for name, size, channels, message in (
        ("missing", 8, 3, "missing: no such folder"),
        (".", 8, 2, "channels=2: give 1 or 3"),
        ("a", 1_000_000, 3, r"0\.png: 8x8 pixels, smaller than 1000000x1000000"),  # 3 TB are not allocated first
    ):
        with pytest.raises(ValueError, match=message):
            image_folder(tmp_path / name, size, channels)


def test_more_images_than_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        write_image(tmp_path / f"{i}.png", noise(64, 64))
    monkeypatch.setattr(folder.os, "sysconf", lambda name: 100)  # a machine of 10,000 bytes
    with pytest.raises(DataError, match=r"3 images of 1x64x64 need 0.0 GiB of memory, and this machine has 0.0"):
        image_folder(tmp_path, 64, 1)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of odd metadata
@settings(deadline=None, max_examples=50)
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
