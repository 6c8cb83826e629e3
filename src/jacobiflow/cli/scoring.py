"""The scores of `jacobiflow evaluate`, as functions to call one after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

import jacobiflow as jf
from jacobiflow import data, evaluation
from jacobiflow.cli.loading import training_noise
from jacobiflow.data import ImageDataset
from jacobiflow.errors import InputValueError
from jacobiflow.evaluation.distances import MIN_IMAGES
from jacobiflow.evaluation.features import FeatureFunction, require_eval_extra
from jacobiflow.models import latents
from jacobiflow.models.checkpoints.fingerprint import cached_fingerprint
from jacobiflow.models.flow import Flow
from jacobiflow.utils import files
from jacobiflow.utils.progress import Progress

Scores: TypeAlias = dict[str, Callable[[], dict[str, Any]]]
"""Functions that compute entries of the results, by the name of the score."""

_MAX_PAIRWISE = 10_000  # Images of either set in scores that compare all pairs.


def distances(
    flow: Flow, extractor: FeatureFunction, folder: jf.SampleFolder | None, real: ImageDataset | None,
    stats: Path | None, save_stats: Path | None, progress: Progress,
) -> Scores:  # fmt: skip
    """Returns the Fréchet distance to real images; with their features, also kernel distance, precision and recall."""
    if isinstance(extractor, nn.Module):
        extractor.to(flow.var.device)
    images = [] if real is None else [_mirror_half(real.images[:], extractor)]
    real_features = cache(partial(evaluation.extract_features, extractor, images, progress))
    scores: Scores = {}
    if save_stats is not None:

        def save_statistics() -> dict[str, Any]:
            save_stats.parent.mkdir(parents=True, exist_ok=True)
            inception = extractor if isinstance(extractor, evaluation.InceptionFeatures) else None
            evaluation.FeatureStatistics.from_features(real_features()).save(save_stats, inception)
            print(f"wrote {save_stats}: statistics of {len(images[0]):,} images")
            return {}

        scores["statistics"] = save_statistics
    if folder is None:
        return scores
    statistics = None if stats is None else evaluation.FeatureStatistics.load(stats)
    num, num_real = folder.manifest.num, len(images[0]) if statistics is None else statistics.num
    if min(num, num_real) < 2:
        raise InputValueError(f"a distance between {num_real} images and {num} samples: give at least 2 of each")
    # A trial of the function, before hours of work.
    width = evaluation.extract_features(extractor, [folder.images(0)[:1]]).shape[1]
    if statistics is not None and len(statistics.sum) != width:
        raise InputValueError(f"--stats {stats}: of {len(statistics.sum)} features, but --features gives {width}")
    features = cache(partial(evaluation.extract_features, extractor, folder.batches(), progress, num))

    def frechet_distance() -> dict[str, Any]:
        reference = evaluation.FeatureStatistics.from_features(real_features()) if statistics is None else statistics
        ours = evaluation.FeatureStatistics.from_features(features())
        return {"frechet_distance": evaluation.frechet_distance(reference, ours)}

    def pairwise() -> dict[str, Any]:
        pair = real_features()[:_MAX_PAIRWISE], features()[:_MAX_PAIRWISE]
        kernel, std = evaluation.kernel_distance(*pair)
        precision, recall = evaluation.precision_recall(*pair)
        return {"kernel_distance": kernel, "kernel_distance_std": std, "precision": precision, "recall": recall}

    scores["FID"] = frechet_distance
    if images and min(num, len(images[0])) >= MIN_IMAGES:
        require_eval_extra("the kernel distance")
        scores["kernel distance, precision and recall"] = pairwise
    return scores


def _mirror_half(images: Tensor, extractor: FeatureFunction) -> Tensor:
    """Mirrors a random half of the real images for Inception, as the original code of TarFlow does."""
    if not isinstance(extractor, evaluation.InceptionFeatures):
        return images
    is_mirrored = torch.rand(len(images), generator=torch.Generator().manual_seed(0)) < 0.5
    return torch.where(is_mirrored.view(-1, 1, 1, 1), images.flip(-1), images)


def paired_errors(folder: jf.SampleFolder, flow: Flow, num: int, batch_size: int) -> Callable[[], dict[str, Any]]:
    """Returns a function that compares the first samples with the exact loop's at the same latents."""
    manifest, config = folder.manifest, flow.config
    shards = range(-(-num // manifest.shard_size))
    labels = [part for i in shards if (part := folder.labels(i)) is not None]
    if manifest.context_sha256 is not None and not labels:
        raise InputValueError("--paired: the samples' texts or numbers are not in the folder; give --paired 0")

    def errors() -> dict[str, Any]:
        sample = partial(
            jf.sample, flow, labels=torch.cat(labels)[:num] if labels else None,
            settings=jf.SamplingSettings(manifest.guidance, manifest.denoise),
            latents=latents.draw_latents(num, config.num_tokens, config.token_channels, manifest.seed),
            certify=manifest.certify, batch_size=batch_size,
        )  # fmt: skip
        sequential = sample(strategy="sequential", sensitivity=True)
        exact = sequential.images.cpu()
        stored = torch.cat([folder.images(i) for i in shards])[:num]
        return {
            "paired": asdict(evaluation.image_errors(sample(strategy=folder.strategy()).images.cpu(), exact)),
            "stored": asdict(evaluation.pixel_difference(stored, data.quantize(exact))),
            "sensitivity": sequential.outcome.sensitivity,
        }

    return errors


def likelihood(flow: Flow, test: ImageDataset, seed: int, batch_size: int, progress: Progress) -> Scores:
    """Returns bits per dimension and class accuracy, with the noise of the flow's training."""
    flow.check_context(test.labels, len(test))
    noise = training_noise(flow)
    name = "bits_per_dim" if noise.kind == "uniform" else "bits_per_dim_noisy"
    arguments = (flow, test, noise, seed, batch_size, progress)
    scores: Scores = {"bits per dimension": lambda: {name: evaluation.bits_per_dim(*arguments)}}
    if test.labels is not None:
        scores["class accuracy"] = lambda: {"bayes_accuracy": evaluation.bayes_accuracy(*arguments)}
    return scores


def digest(
    settings: tuple[Any, ...], flow: Flow, folder: jf.SampleFolder | None, images: tuple[ImageDataset | None, ...],
    paths: tuple[Path | None, ...],
) -> str:  # fmt: skip
    """Returns a checksum of all inputs of the scores: settings, weights, samples, images and files."""
    network = (cached_fingerprint(flow), repr(flow.config), flow.precision, flow.var.device.type)
    manifest = None if folder is None else folder.path / files.MANIFEST
    tensors = [tensor for each in images if each is not None for tensor in (each.images[:], each.labels)]
    return files.sha256(
        files.json_bytes([jf.__version__, *settings, *network]),
        *(path for path in (manifest, *paths) if path is not None and path.is_file()),
        *(tensor.numpy().tobytes() for tensor in tensors if tensor is not None),
    )
