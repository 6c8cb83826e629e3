"""Labelled images, in memory or in files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from jacobiflow.data.image_files import ImageFiles
from jacobiflow.errors import DataError
from jacobiflow.utils.checks import check_kind, format_value
from jacobiflow.utils.files import sha256


@dataclass(frozen=True, eq=False)
class ImageDataset(Dataset[Any]):
    """Labelled 8-bit images. Its items are an image and its label, or the image alone.

    Args:
        images: The images, uint8 of shape (N, C, H, W): a tensor, or files that are read when they are indexed.
        labels: The class of each image, int64 of shape (N,) and at least 0; None without classes.
        classes: The names of the classes, such as the subfolders of a folder of images; empty without names.

    Example:
        >>> data = ImageDataset(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]))
        >>> images, labels = data.batch(slice(0, 1))
        >>> len(data), images.unique().tolist(), labels.tolist()
        (2, [-1.0], [0])
    """

    images: UInt8[Tensor, "n c h w"] | ImageFiles
    labels: Int[Tensor, " n"] | None
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        check_kind("images", images, (Tensor, ImageFiles), "a torch.Tensor of 8-bit images (N, C, H, W)")
        check_kind("labels", labels, (Tensor, type(None)), "a torch.Tensor with one whole number per image, or None")
        if isinstance(images, Tensor) and (images.dtype != torch.uint8 or images.ndim != 4 or not images.numel()):
            raise DataError(f"images={format_value(images)}: give torch.uint8 of shape (N, C, H, W), each at least 1")
        if labels is not None and (labels.dtype != torch.int64 or labels.shape != (len(images),) or labels.min() < 0):
            raise DataError(
                f"labels={format_value(labels)}: give torch.int64 of shape ({len(images)},), each at least 0"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.images[index] if self.labels is None else (self.images[index], self.labels[index])

    def batch(self, index: Tensor | slice) -> tuple[Float[Tensor, "b c h w"], Int[Tensor, " b"] | None]:
        """Returns images scaled to [-1, 1] and labels at `index`."""
        return scale(self.images[index]), None if self.labels is None else self.labels[index]

    def evenly_spaced(self, num: int) -> ImageDataset:
        """Returns `num` evenly spaced images, read into memory if they are in files."""
        index = torch.arange(num, device="cpu") * len(self) // num
        return replace(self, images=self.images[index], labels=None if self.labels is None else self.labels[index])

    def sha256(self) -> str:
        """Returns the SHA-256 of the images, or of their files, and of the labels."""
        images = self.images.files if isinstance(self.images, ImageFiles) else (self.images.numpy().tobytes(),)
        return sha256(*images, b"" if self.labels is None else self.labels.numpy().tobytes())


def scale(images: UInt8[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Scales 8-bit values 0 .. 255 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def quantize(images: Float[Tensor, "*n"]) -> UInt8[Tensor, "*n"]:
    """Clips images to [-1, 1] and rounds them to 8 bits, the inverse of `scale`. NaN becomes black."""
    return ((images.float().nan_to_num(nan=-1.0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def balanced_labels(num: int, num_classes: int) -> Int[Tensor, " n"]:
    """Returns labels 0, 1, ..., num_classes - 1, 0, 1, ..., so that all classes are equally frequent."""
    return torch.arange(num, device="cpu") % num_classes
