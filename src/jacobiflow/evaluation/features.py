"""Features of images: Inception's, and those of your own function."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias
from urllib.error import URLError

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from jacobiflow.data.grid import PICTURE_CHANNELS
from jacobiflow.errors import DataError, first_line
from jacobiflow.utils.checks import check_finite, check_floating
from jacobiflow.utils.functions import load_function

FeatureFunction: TypeAlias = Callable[[UInt8[Tensor, "n c h w"]], Float[Tensor, "n d"]]

_WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth"


def load_features(name: str, inception: Path | None = None) -> FeatureFunction:
    """Loads a function from 8-bit images to features.

    Args:
        name: "inception", or "FILE.py:FUNCTION", a function of your own, which takes uint8 images (N, C, H, W) and
            returns floating-point features (N, d). The file is run.
        inception: A file of Inception's weights; see `InceptionFeatures`.
    """
    return InceptionFeatures(inception) if name == "inception" else load_function(name, "inception")


class InceptionFeatures(nn.Module):
    """The 2,048 features of the Inception network that defines FID.

    The network is torch-fidelity's, and torchmetrics' code resizes the images. They are 8-bit images (N, 1 or 3, H, W);
    a grey image is used as three equal channels.

    Args:
        weights: A file of the network's weights. By default PyTorch's hub downloads it into its folder.

    Reference: Heusel et al., GANs Trained by a Two Time-Scale Update Rule, arXiv 1706.08500.
    """

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        require_eval_extra("Inception's features")
        from torchmetrics.image.fid import NoTrainInceptionV3

        if weights is not None:
            load_tensors(weights, _WEIGHTS_FILE)  # torch-fidelity would run code in the file
        try:
            self.network = NoTrainInceptionV3(
                "inception-v3-compat", ["2048"], None if weights is None else str(weights)
            )
        except URLError as error:
            reason = f"the download failed ({error.reason})"
            raise DataError(f"Inception's weights: {reason}; give a file, features of your own, or 'none'") from error
        except (RuntimeError, AttributeError, TypeError) as error:
            raise DataError(f"{weights}: weights of another network; give {_WEIGHTS_FILE}") from error

    def forward(self, images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n 2048"]:
        """Returns the features of 8-bit images. Raises ValueError for images that are neither grey nor in colour."""
        if images.shape[1] not in PICTURE_CHANNELS:
            raise DataError(f"Inception is for grey and colour images, and these have {images.shape[1]} channels")
        return self.network(images.expand(-1, 3, -1, -1))


def load_tensors(path: Path, expected: str) -> Any:
    """Loads tensors that `torch.save` wrote; runs no code in the file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise DataError(f"{path}: no file of tensors ({first_line(error)}); give {expected}") from error


@torch.inference_mode()
def extract_features(
    features: FeatureFunction, images: UInt8[Tensor, "n c h w"], batch_size: int = 250
) -> Float[Tensor, "n d"]:
    """Computes the features of 8-bit images.

    Args:
        features: A function, or a module, which gets the images on its device.
        batch_size: Images in the network at a time.

    Raises:
        ValueError, TypeError: If `features` does not return finite floating-point features (n, d) for n images.
    """
    weight = next(features.parameters(), None) if isinstance(features, nn.Module) else None
    device = torch.device("cpu") if weight is None else weight.device
    parts = list[Tensor]()
    width: int | str = "d"
    for part in images.split(batch_size):
        values = features(part.to(device))
        check_floating("result of the feature function", values, (len(part), width))
        check_finite("result of the feature function", values)
        width = values.shape[1]
        parts.append(values.float().cpu())
    return torch.cat(parts)


def require_eval_extra(what: str) -> None:
    """Raises DataError if torchmetrics or torch-fidelity is not installed; an import would take seconds."""
    if find_spec("torchmetrics") is None or find_spec("torch_fidelity") is None:
        raise DataError(f"{what}: pip install torchmetrics torch-fidelity, or give features 'none'")
