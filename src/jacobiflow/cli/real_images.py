"""The real images that `evaluate` and `compare` measure samples against."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from jacobiflow.cli import options
from jacobiflow.cli.progress import progress
from jacobiflow.errors import InputValueError
from jacobiflow.evaluation import ConvolutionalFeatures, InceptionFeatures, Statistics, extract, load_features
from jacobiflow.evaluation.convolutional import BUNDLED
from jacobiflow.flows.image_flow import ImageFlow


@dataclass(frozen=True)
class RealImages:
    """What samples are compared with: `statistics` of real images from `source`, and `features` of the images given."""

    extractor: ConvolutionalFeatures | InceptionFeatures
    statistics: Statistics
    source: str
    features: Tensor | None


def real_images(
    flow: ImageFlow, kind: str, inception: Path | None, images: str | None, stats: Path | None
) -> RealImages:
    """The real images, or the statistics of them, that `--images`, `--stats` and `--features` name.

    **Raises** `ValueError` where they name none, or what cannot be read or does not fit.
    """
    config = flow.config
    shape = (config.in_channels, config.image_size, config.image_size)
    if kind in BUNDLED and BUNDLED[kind].shape != shape:
        others = [*(name for name, trained in BUNDLED.items() if trained.shape == shape), "inception"]
        want, have = ("x".join(map(str, sizes)) for sizes in (BUNDLED[kind].shape, shape))
        raise InputValueError(
            f"--features {kind}: is of {want} images, this model's are {have}; give {' or '.join(others)}"
        )
    if kind == "inception" and images is None and stats is None:
        raise InputValueError("--features inception: give --images or --stats, to compare with")
    extractor = load_features(kind, inception).to(flow.var.device)  # type: ignore[arg-type]
    given = None if stats is None else Statistics.load(stats)
    if given is not None and len(given.sum) != extractor.num_features:
        raise InputValueError(
            f"--stats {stats}: statistics of {len(given.sum)} features against {extractor.num_features}: give "
            "statistics of the same features"
        )
    features = None
    if images is not None:
        training = options.read_images(images, config.image_size, config.in_channels).images
        if len(training) < 2:
            raise InputValueError(f"--images {images}: statistics of {len(training)} images: give at least 2")
        if kind == "inception":
            training = _half_mirrored(training)  # as the original's data loader does
        with progress(f"features of {images}", len(training)) as advance:
            features = extract(extractor, [training], advance)
    if given is not None:
        return RealImages(extractor, given, str(stats), features)
    if features is not None:
        return RealImages(extractor, Statistics.of(features), f"the training split of {images}", features)
    return RealImages(extractor, Statistics.bundled(kind), BUNDLED[kind].words, None)


def _half_mirrored(images: Tensor) -> Tensor:
    """The images, a random half of them mirrored, the same half each time."""
    mirrored = torch.rand(len(images), generator=torch.Generator().manual_seed(0)) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
