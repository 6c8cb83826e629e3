"""Features of small convolutional networks, for Fréchet distances that need no download.

    jacobiflow evaluate --model fashion-p2 --samples out/many --features benchmarks/features.py:fashion \\
        --stats benchmarks/weights/fashion_fid_stats.pth

`tools/models/train_features.py` trains the networks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from jacobiflow.data import digits, scale
from jacobiflow.evaluation import FeatureStatistics, extract_features, frechet_distance

WEIGHTS = Path(__file__).parent / "weights"


class TrainingImages(NamedTuple):
    """The images that a network was trained on: (channels, size, size), of `classes` classes."""

    channels: int
    size: int
    classes: int
    description: str


KINDS = {
    "fashion": TrainingImages(1, 28, 10, "the 60,000 training images of Fashion-MNIST"),
    # Too few for features of six classes: every image is a class of its own, whose members are its augmentations.
    "emoji": TrainingImages(3, 32, 1229, "the 1,229 training images of emoji"),
}


def weights_file(kind: str) -> Path:
    return WEIGHTS / f"{kind}_features.safetensors"


def statistics_file(kind: str) -> Path:
    """The file of the statistics of the features of a kind over its training images."""
    return WEIGHTS / f"{kind}_fid_stats.pth"


class ConvolutionalFeatures(nn.Module):
    """A convolutional classifier that returns the 64 features before its last layer.

    It takes 8-bit images (N, C, H, W). The classes of "fashion" are those of Fashion-MNIST. Those of "emoji" are its
    training images, one each, which the network recognises when they are mirrored, shifted and recoloured (Dosovitskiy
    et al., arXiv 1406.6909).
    """

    num_features = 64

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, images = kind, KINDS[kind]
        self.convolutions = nn.Sequential(
            *_convolution(images.channels, 32), *_convolution(32, 32), nn.MaxPool2d(2),
            *_convolution(32, 64), *_convolution(64, 64), nn.MaxPool2d(2),
            *_convolution(64, 128),
        )  # fmt: skip
        self.hidden = nn.Linear(128, self.num_features)
        self.output = nn.Linear(self.num_features, images.classes)

    def forward(self, images: Tensor) -> Tensor:
        """The features (N, 64), at least 0. Raises ValueError for images of another type or shape."""
        channels, size, *_ = KINDS[self.kind]
        shape = (channels, size, size)
        if images.dtype != torch.uint8 or images.shape[1:] != shape:
            raise ValueError(
                f"images: {images.dtype} of shape {tuple(images.shape)}; {self.kind} features take torch.uint8 of "
                f"shape {('N', *shape)}"
            )
        x = images.to(self.hidden.weight) / 127.5 - 1
        return F.relu(self.hidden(self.convolutions(x).mean(dim=(2, 3))))


def _convolution(channels: int, out: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()


@cache
def trained(kind: str) -> ConvolutionalFeatures:
    network = ConvolutionalFeatures(kind)
    network.load_state_dict({name: value.float() for name, value in load_file(weights_file(kind)).items()})
    return network.eval().requires_grad_(False)


class Distance(NamedTuple):
    """A Fréchet distance to real images: features of 8-bit images (N, C, H, W), and their statistics for real ones."""

    name: str
    features: Callable[[Tensor], Tensor]
    real: FeatureStatistics

    def __call__(self, images: Tensor) -> float:
        features = extract_features(self.features, images)
        return frechet_distance(self.real, FeatureStatistics.from_features(features))


def trained_distance(kind: str) -> Distance:
    """The distance to the training images between features of the network that was trained on them."""
    return Distance(f"{kind}_fid", trained(kind), FeatureStatistics.load(statistics_file(kind)))


def pixel_distance() -> Distance:
    """The distance of pixels to scikit-learn's 1,797 digits."""

    def pixels(images: Tensor) -> Tensor:
        return scale(images).flatten(1)

    return Distance("pixel_distance", pixels, FeatureStatistics.from_features(pixels(digits().images[:])))


def fashion(images: Tensor) -> Tensor:
    """Features (N, 64) of 8-bit grey images (N, 1, 28, 28)."""
    return trained("fashion")(images)


def emoji(images: Tensor) -> Tensor:
    """Features (N, 64) of 8-bit colour images (N, 3, 32, 32)."""
    return trained("emoji")(images)
