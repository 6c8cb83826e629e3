"""IDX files: every one reads back, and every broken one is a `DataError` that names it."""

from __future__ import annotations

import gzip
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from jacobiflow.data import DataError, fashion_mnist, idx_folder, load_images, read_idx


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "file"


def idx_bytes(array: NDArray[np.uint8]) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@st.composite
def files(draw: st.DrawFn) -> tuple[bytes, NDArray[np.uint8] | None]:
    """Any bytes; or the IDX file of an array, perhaps gzipped: with the array, or damaged."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=64)), None
    array = draw(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)))
    content = bytearray(gzip.compress(idx_bytes(array), mtime=0) if draw(st.booleans()) else idx_bytes(array))
    if draw(st.booleans()):
        return bytes(content), array
    content[draw(st.integers(0, min(len(content), 32) - 1))] ^= draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(0, len(content)))]), None


@settings(deadline=None, max_examples=100)
@given(file=files())
@example((b"\0\0\x08\xff" + bytes(4 * 255), None))  # more axes than NumPy has
@example((b"\0\0\x08\x04" + bytes(4) + b"\xff" * 12, None))  # empty, but too large for an array's strides
@example((b"\0\0\x08\x02" + b"\x80\0\0\0" * 2, None))  # 2^62 bytes
@example((b"\x1f\x8b\x08\x00" + bytes(6) + b"\xff" * 8, None))  # zlib.error
def test_files_are_read_and_damaged_ones_refused(scratch: Path, file: tuple[bytes, NDArray[np.uint8] | None]) -> None:
    content, array = file
    scratch.write_bytes(content)
    try:
        read = read_idx(scratch)
    except DataError as error:
        assert array is None and str(scratch) in str(error)
    else:  # damage may be harmless
        assert read.dtype == np.uint8
        assert idx_bytes(read) == (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)
        assert array is None or np.array_equal(read, array)


def test_errors_say_what_is_wrong_and_an_archive_is_not_unpacked_beyond_its_header(scratch: Path) -> None:
    whole = idx_bytes(noise(3, 2))
    scratch.unlink(missing_ok=True)
    with pytest.raises(DataError, match=f"{scratch}: cannot be read .No such file or directory.; check the path"):
        read_idx(scratch)
    for content, message in (
        (b"\0\0\x0d\x01\0\0\0\0", "starts with 00 00 0d 01, not as an IDX file of unsigned bytes"),
        (b"\0\0\x08\x03\0\0", "truncated inside its header of 16 bytes; fetch"),
        (whole[:-1], r"header \(3, 2\) asks for 6 bytes, it holds 5; fetch"),
        (gzip.compress(b"\0\0\x08\2" + b"\0\x10\0\0" * 2), "asks for 1099511627776 bytes, more than it can hold"),
        (b"\0\0\x08\2\0\x99\0\0" + bytes(4), "10,027,008 images; the limit is 10,000,000"),
        (gzip.compress(whole)[:-2], "broken gzip data .*; fetch"),
        (gzip.compress(whole + bytes(1 << 25), compresslevel=1), "asks for 6 bytes, it holds more"),
    ):
        scratch.write_bytes(content)
        tracemalloc.start()
        with pytest.raises(DataError, match=f"{scratch}: .*{message}"):
            read_idx(scratch)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 23


def test_a_folder_of_idx_files(tmp_path: Path) -> None:
    def write(images: NDArray[np.uint8], labels: list[int], stem: str = "train") -> None:
        """`images` gzipped and `labels` plain, as both are allowed."""
        (tmp_path / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
        (tmp_path / f"{stem}-labels-idx1-ubyte").write_bytes(idx_bytes(np.array(labels, np.uint8)))

    images, labels = noise(5, 28, 28), [9, 0, 3, 3, 1]
    write(images, labels, "t10k")
    data = idx_folder(tmp_path, "test")
    assert np.array_equal(data.images[:, 0], images)
    assert data.labels is not None and data.labels.tolist() == labels
    assert data.classes == tuple("0123456789")
    assert torch.equal(load_images(str(tmp_path), 28, 1, "test").images, data.images)
    assert fashion_mnist("test", tmp_path).classes[9] == "Ankle boot"
    with pytest.raises(DataError, match=r"no train-images-idx3-ubyte\[.gz\]; give a readable folder"):
        idx_folder(tmp_path, "train")
    with pytest.raises(DataError, match="split='valid': give 'train' or 'test'"):
        idx_folder(tmp_path, "valid")  # type: ignore[arg-type]
    for shape, wrong, message in (
        ((5, 4, 4), [0] * 4, r"labels-idx1-ubyte: shape \(4,\), but .* holds 5 images; fetch both"),
        ((5, 16), [0] * 5, r"images-idx3-ubyte.gz: shape \(5, 16\); give"),
        ((2, 4, 4), [0, 10], "labels-idx1-ubyte: has label 10; give labels 0 to 9"),
    ):
        write(noise(*shape), wrong)
        with pytest.raises(DataError, match=message):
            idx_folder(tmp_path)
