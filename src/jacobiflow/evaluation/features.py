"""Features of images: what Fréchet distances and their kin are taken between."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from jacobiflow.checks import check_choice
from jacobiflow.data import DataError
from jacobiflow.errors import InputValueError
from jacobiflow.evaluation.convolutional import BUNDLED, ConvolutionalFeatures
from jacobiflow.flows.weights import load_torch

Kind = Literal["fashion", "emoji", "inception"]
NAMES: dict[str, str] = {kind: f"{kind}-FID" for kind in BUNDLED} | {"inception": "FID"}
"""Kinds of features, and what the Fréchet distance between them is called."""

_POOL = 2048
_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth, of torch-fidelity's releases"


class InceptionFeatures(nn.Module):
    """The 2,048 features of the Inception network that defines FID, as torchmetrics has it.

    It takes 8-bit images (N, 1 or 3, H, W), grey ones as three equal channels, and resizes them itself.

    **Arguments:** `weights`, a file of the network's weights. With `None` they are read from PyTorch's hub folder, or
    downloaded into it.

    **Raises** `DataError` where torchmetrics and torch-fidelity are not installed, there are no such weights, or one is
    not finite.

    Reference: Heusel et al., GANs Trained by a Two Time-Scale Update Rule, arXiv 1706.08500.
    """

    num_features = _POOL

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        need_torchmetrics("FID")
        from torchmetrics.image.fid import NoTrainInceptionV3

        state = _download() if weights is None else load_tensors(weights, _WEIGHTS)
        with tempfile.TemporaryDirectory() as folder:  # torch-fidelity reads a file, and would run what else it holds
            path = Path(folder) / "weights.pth"
            torch.save(state, path)
            try:
                self.network = NoTrainInceptionV3("inception-v3-compat", [str(_POOL)], str(path))
            except (RuntimeError, AttributeError, TypeError) as error:
                raise DataError(f"{weights or _hub_file()}: weights of another network; give {_WEIGHTS}") from error
        broken = [name for name, value in self.network.state_dict().items() if not value.isfinite().all()]
        if broken:
            raise DataError(f"{weights or _hub_file()}: {broken[0]} has non-finite values; give {_WEIGHTS}")

    def forward(self, images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n 2048"]:
        """The features. **Raises** `ValueError` for images of another type or number of channels."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            have = f"{images.dtype} of shape {tuple(images.shape)}"
            raise InputValueError(f"images: {have}; Inception takes torch.uint8 of shape (N, 1 or 3, H, W)")
        return self.network(images.expand(-1, 3, -1, -1))


def _download() -> Any:
    """Inception's weights from PyTorch's hub folder, downloaded into it where they are missing."""
    from torch_fidelity import feature_extractor_inceptionv3 as network

    try:
        return network.load_state_dict_from_url(network.URL_INCEPTION_V3, map_location="cpu", weights_only=True)
    except URLError as error:
        raise DataError(
            f"Inception's weights: not at {_hub_file()}, and the download failed ({error.reason}); give the file "
            f"{_WEIGHTS}, or use features whose weights are bundled"
        ) from error
    except Exception as error:  # torch.load raises many kinds
        raise DataError(f"{_hub_file()}: not Inception's weights ({_reason(error)}); remove it") from error


def _hub_file() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / _WEIGHTS.partition(",")[0]


def load_tensors(path: Path, expected: str) -> Any:
    """What `torch.save` wrote, tensors only: no code in the file is run.

    **Raises** `DataError` that names the file and says to give the `expected` one.
    """
    try:
        return load_torch(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give {expected}") from error
    except Exception as error:  # torch.load raises many kinds
        raise DataError(f"{path}: no file of tensors ({_reason(error)}); give {expected}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return "not a file of PyTorch, or one that holds more than tensors, which is not run"
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def load_features(kind: Kind, inception: Path | None = None) -> ConvolutionalFeatures | InceptionFeatures:
    """The network of a kind, in evaluation mode; see `InceptionFeatures` for `inception`, its file, and for errors."""
    check_choice("kind", kind, tuple(NAMES))
    return ConvolutionalFeatures.bundled(kind) if kind in BUNDLED else InceptionFeatures(inception)


@torch.inference_mode()
def extract(
    features: nn.Module,
    batches: Iterable[UInt8[Tensor, "b c h w"]],
    on_batch: Callable[[int], None] | None = None,
    batch_size: int = 250,
) -> Float[Tensor, "n d"]:
    """Features (N, d), on the CPU, of all images in `batches`, `batch_size` at a time.

    `on_batch` is called with the number of images each time. **Raises** `DataError` where there are no images.
    """
    device = next(features.parameters()).device
    found = []
    for images in batches:
        for part in images.split(batch_size):
            found.append(features(part.to(device)).float().cpu())
            if on_batch is not None:
                on_batch(len(part))
    if not found:
        raise DataError("features of no images: give at least one")
    return torch.cat(found)


def need_torchmetrics(what: str) -> None:
    """**Raises** `DataError` where torchmetrics and torch-fidelity are not installed."""
    try:
        import torch_fidelity  # noqa: F401
        import torchmetrics  # noqa: F401
    except ImportError as error:
        raise DataError(f"{what}: needs torchmetrics and torch-fidelity; pip install 'jacobiflow[eval]'") from error
