"""Features of Fashion-MNIST images, for a Fréchet distance that needs no download."""

from __future__ import annotations

from importlib import resources

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from safetensors.torch import load
from torch import Tensor, nn

WEIGHTS, STATISTICS = "fashion_features.safetensors", "fashion_fid_stats.pth"
SIZE, CLASSES = 28, 10


class FashionFeatures(nn.Module):
    """A convolutional classifier of Fashion-MNIST; called, it gives the features before its last layer.

    Five convolutions with batch normalisation, the mean over pixels, and a layer of 64 units. It takes 8-bit images
    (N, 1, 28, 28), as torchmetrics gives them to a `feature` module. It stays in evaluation mode; to train it, put its
    `convolutions` into training mode.
    """

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            *_convolution(1, 32), *_convolution(32, 32), nn.MaxPool2d(2),
            *_convolution(32, 64), *_convolution(64, 64), nn.MaxPool2d(2),
            *_convolution(64, 128),
        )  # fmt: skip
        self.hidden = nn.Linear(128, self.num_features)
        self.output = nn.Linear(self.num_features, CLASSES)

    @classmethod
    def bundled(cls) -> FashionFeatures:
        """The trained weights that ship with the package, in evaluation mode."""
        features = cls()
        features.load_state_dict(load(resources.files("jacobiflow.evaluation").joinpath(WEIGHTS).read_bytes()))
        return features.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> FashionFeatures:
        """Evaluation mode, whatever `mode`: training mode would change what a metric measures."""
        return super().train(False)

    def forward(self, images: UInt8[Tensor, "n 1 28 28"]) -> Float[Tensor, "n 64"]:
        """The 64 features, at least 0. **Raises** `ValueError` for images of another type or shape."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (1, SIZE, SIZE):
            have = f"{images.dtype} of shape {tuple(images.shape)}"
            raise ValueError(f"images: {have}; fashion features take torch.uint8 of shape (N, 1, {SIZE}, {SIZE})")
        x = images.to(self.hidden.weight) / 127.5 - 1
        return F.relu(self.hidden(self.convolutions(x).mean(dim=(2, 3))))

    def classify(self, images: UInt8[Tensor, "n 1 28 28"]) -> Float[Tensor, "n 10"]:
        """Logits of the ten classes."""
        return self.output(self(images))


def _convolution(channels: int, out: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()
