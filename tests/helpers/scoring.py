"""Figures of images once more, from the files of a folder of samples and by NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Array = NDArray[np.float64]
Pixels = NDArray[np.uint8]


def levels(images: Tensor) -> Pixels:
    """8-bit pixels (N, H, W, C); what is NaN or infinite is black."""
    x = np.nan_to_num(images.float().numpy(), nan=-1.0, posinf=-1.0, neginf=-1.0).transpose(0, 2, 3, 1)
    return np.round((np.clip(x, -1, 1) + 1) * np.float32(127.5)).astype(np.uint8)


def on_disk(path: str | Path) -> Pixels:
    """8-bit pixels (N, H, W, C) of a folder of samples, in their order."""
    pngs = sorted(Path(path, "images").rglob("*.png"), key=lambda png: png.name)
    if pngs:
        return np.stack([np.asarray(Image.open(png))[..., None] for png in pngs])
    return np.concatenate([np.load(shard)["arr_0"] for shard in sorted(Path(path, "shards").glob("*.npz"))])


def moments(x: Array) -> tuple[Array, Array]:
    """Mean and covariance of features (N, d)."""
    return x.mean(axis=0), np.cov(x, rowvar=False)


def frechet(real: tuple[Array, Array], fake: tuple[Array, Array]) -> float:
    """|m - m'|^2 + tr(S + S' - 2 (S S')^1/2) of two pairs of moments."""
    (mean_r, cov_r), (mean_f, cov_f) = real, fake
    value, vector = np.linalg.eigh(cov_r)
    half = (vector * np.sqrt(np.clip(value, 0, None))) @ vector.T
    root = np.sqrt(np.clip(np.linalg.eigvalsh(half @ cov_f @ half), 0, None)).sum()
    return float(((mean_r - mean_f) ** 2).sum() + np.trace(cov_r) + np.trace(cov_f) - 2 * root)


def difference(images: Tensor, exact: Tensor) -> tuple[float, float]:
    """The largest and the root-mean-square difference of an entry."""
    off = images.double().numpy() - exact.double().numpy()
    return float(np.abs(off).max()), float(np.sqrt((off**2).mean()))


def pixel_figures(pixels: Pixels, exact: Pixels) -> dict[str, Any]:
    """The share of 8-bit pixels that differ, and by how many levels at most."""
    off = np.abs(pixels.astype(int) - exact.astype(int))
    return {"share": pytest.approx((off > 0).mean()), "levels": off.max()}
