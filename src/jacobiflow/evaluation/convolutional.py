"""Features of small convolutional networks that ship with the package, for Fréchet distances that need no download."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from safetensors.torch import load
from torch import Tensor, nn

from jacobiflow.checks import check_choice
from jacobiflow.errors import InputValueError


class TrainingImages(NamedTuple):
    """What a network was trained on: images of `channels` x `size` x `size`, in so many `classes`; in words."""

    channels: int
    size: int
    classes: int
    words: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, self.size, self.size


BUNDLED: Mapping[str, TrainingImages] = {
    "fashion": TrainingImages(1, 28, 10, "the 60,000 training images of Fashion-MNIST"),
    # Too few for features of six classes: every image is a class of its own, whose members are its augmentations.
    "emoji": TrainingImages(3, 32, 1229, "the 1,229 training images of emoji"),
}
"""The kinds of features that ship with the package."""


def weights_file(kind: str) -> str:
    """The file of a kind's weights, beside this module."""
    return f"{kind}_features.safetensors"


def statistics_file(kind: str) -> str:
    """The file of the statistics of a kind's training images, beside this module."""
    return f"{kind}_fid_stats.pth"


class ConvolutionalFeatures(nn.Module):
    """A convolutional classifier; called, it gives the features before its last layer.

    Five convolutions with batch normalisation, the mean over pixels, and a layer of 64 units. It takes 8-bit images
    (N, C, H, W), as torchmetrics gives them to a `feature` module. It stays in evaluation mode; to train it, put its
    `convolutions` into training mode.

    The classes of "fashion" are those of Fashion-MNIST. Those of "emoji" are its training images, one each, which the
    network recognises when they are mirrored, shifted and recoloured (Dosovitskiy et al., arXiv 1406.6909).

    **Arguments:** `kind`, "fashion" or "emoji". **Raises** `ValueError` for another.
    """

    num_features = 64

    def __init__(self, kind: str) -> None:
        super().__init__()
        check_choice("kind", kind, tuple(BUNDLED))
        self.kind, images = kind, BUNDLED[kind]
        self.convolutions = nn.Sequential(
            *_convolution(images.channels, 32), *_convolution(32, 32), nn.MaxPool2d(2),
            *_convolution(32, 64), *_convolution(64, 64), nn.MaxPool2d(2),
            *_convolution(64, 128),
        )  # fmt: skip
        self.hidden = nn.Linear(128, self.num_features)
        self.output = nn.Linear(self.num_features, images.classes)

    @classmethod
    def bundled(cls, kind: str) -> ConvolutionalFeatures:
        """The trained weights that ship with the package, in evaluation mode."""
        features = cls(kind)
        data = resources.files("jacobiflow.evaluation").joinpath(weights_file(kind)).read_bytes()
        features.load_state_dict({name: value.float() for name, value in load(data).items()})
        return features.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> ConvolutionalFeatures:
        """Evaluation mode, whatever `mode`: training mode would change what a metric measures."""
        return super().train(False)

    def forward(self, images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n 64"]:
        """The 64 features, at least 0. **Raises** `ValueError` for images of another type or shape."""
        shape = BUNDLED[self.kind].shape
        if images.dtype != torch.uint8 or images.shape[1:] != shape:
            have = f"{images.dtype} of shape {tuple(images.shape)}"
            want = ", ".join(map(str, ("N", *shape)))
            raise InputValueError(f"images: {have}; {self.kind} features take torch.uint8 of shape ({want})")
        x = images.to(self.hidden.weight) / 127.5 - 1
        return F.relu(self.hidden(self.convolutions(x).mean(dim=(2, 3))))


def _convolution(channels: int, out: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()
