"""Labelled images in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from jacobiflow.checks import check_kind
from jacobiflow.errors import InputValueError
from jacobiflow.memory import shortage

LIMIT = 10_000_000  # images, or files to look through


class DataError(InputValueError):
    """Data, or a file or folder of it, that cannot be used; the message names it and the remedy."""


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """8-bit images (N, C, H, W), a label (int64) per image or `None`, and the names of the classes.

    **Raises** `TypeError` for what is no tensor, `DataError` for other types or shapes, a dataset without images, and
    labels below 0 or without a class.
    """

    images: UInt8[Tensor, "n c h w"]
    labels: Int[Tensor, " n"] | None
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        check_kind("images", images, Tensor, "a torch.Tensor of 8-bit images (N, C, H, W)")
        check_kind("labels", labels, (Tensor, type(None)), "a torch.Tensor with one whole number per image, or None")
        if images.dtype != torch.uint8 or images.ndim != 4 or not images.numel():
            have = f"{images.dtype} of shape {tuple(images.shape)}"
            raise DataError(f"images: {have}; give torch.uint8 of shape (N, C, H, W), none of them 0")
        if labels is not None and (labels.dtype != torch.int64 or labels.shape != images.shape[:1]):
            have = f"{labels.dtype} of shape {tuple(labels.shape)}"
            raise DataError(f"labels: {have}; give torch.int64 of shape ({len(images)},), one per image")
        if labels is not None and (labels.min() < 0 or (self.classes and labels.max() >= len(self.classes))):
            last = f"to {len(self.classes) - 1}" if self.classes else "and above"
            raise DataError(f"labels from {labels.min()} to {labels.max()}: give classes 0 {last}")

    def __len__(self) -> int:
        return self.images.shape[0]

    def batch(self, index: Tensor | slice) -> tuple[Float[Tensor, "b c h w"], Int[Tensor, " b"] | None]:
        """Images scaled to [-1, 1] and labels at `index`."""
        return scale(self.images[index]), None if self.labels is None else self.labels[index]


def check_room(source: object, num: int, *sizes: int) -> None:
    """**Raises** `DataError` where `num` 8-bit images of `sizes` are too many, or more than memory holds."""
    if num > LIMIT:
        raise DataError(f"{source}: {num:,} images; the limit is {LIMIT:,}: give fewer")
    lacking = shortage(num * math.prod(sizes))
    if lacking:
        have = "x".join(map(str, sizes))
        raise DataError(f"{source}: {num:,} images of {have} need {lacking}; give fewer or smaller ones")


def scale(images: UInt8[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """8-bit values 0 .. 255 as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def quantize(images: Float[Tensor, "*n"]) -> UInt8[Tensor, "*n"]:
    """Images, nominally in [-1, 1], clipped and rounded to 8 bits: the inverse of `scale`."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def balanced_labels(num: int, num_classes: int) -> Int[Tensor, " n"]:
    """Labels 0, 1, ..., num_classes-1, 0, 1, ...: label of sample i is i mod num_classes."""
    if num < 0 or num_classes < 1:
        raise DataError(f"num={num}, num_classes={num_classes}: give at least 0 labels, and at least 1 class")
    return torch.arange(num) % num_classes
