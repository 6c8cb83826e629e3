"""`jacobiflow evaluate`: scores of a model and its samples."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

import jacobiflow as jf
from jacobiflow.cli import shared
from jacobiflow.cli.shared import progress_bar, show_table
from jacobiflow.errors import InputValueError

if TYPE_CHECKING:
    from torch import Tensor

    from jacobiflow.data import ImageDataset
    from jacobiflow.evaluation.features import FeatureFunction
    from jacobiflow.flows.flow import Flow
    from jacobiflow.progress import Progress

_FEW = 10_000  # images on either side of what compares each with each
_TABLE = "evaluation.json"
_FEATURES = (
    "inception (FID), or FILE.py:FUNCTION for a function from 8-bit images (N, C, H, W) to features (N, d); or none. "
    "Default: inception, if there are real images."
)
# Name, value, and remark of a score that is in the results.
_SCORES = (
    ("FID of {features}", "{frechet_distance:.4f}", "{num:,} samples against {against}"),
    ("kernel distance", "{kernel_distance:.5f}", "+-{kernel_distance_std:.5f} over subsets"),
    ("precision", "{precision:.3f}", ""),
    ("recall", "{recall:.3f}", ""),
    ("certificate", "{certificates[max]:.1e}", "largest; median {certificates[median]:.1e}"),
    ("re-solved", "{resolved_sequentially:,}", "samples, token by token"),
    ("lost", "{lost:,}", "samples, whose exact inverse overflows: black images, which count above"),
    ("largest error", "{paired[max]:.1e}", "{paired[num]:,} samples, against the sequential loop"),
    ("RMS error", "{paired[rms]:.1e}", "the same"),
    ("PSNR", "{paired[psnr]:.1f} dB", "the same"),
    ("8-bit pixels", "{stored[share]:.3%}", "of the stored images differ, by {stored[levels]} at most"),
    ("bits per dimension", "{bits_per_dim:.3f}", "{test_images:,} uniformly dequantised test images"),
    ("bits per dimension", "{bits_per_dim_noisy:.3f}", "{test_images:,} noisy test images"),
    ("class accuracy", "{bayes_accuracy:.1%}", "by Bayes' rule; the same test images"),
)


def evaluate(
    model: shared.Model = "fashion-p2",
    samples: Annotated[Path | None, Option(help="A folder that jacobiflow sample wrote.")] = None,
    images: Annotated[str | None, Option(help=f"Real images to compare with: {shared.SOURCES}")] = None,
    features: Annotated[str | None, Option(help=_FEATURES)] = None,
    inception: Annotated[Path | None, Option(help="File of Inception's weights. Default: it is downloaded.")] = None,
    stats: Annotated[Path | None, Option(help="Statistics to compare with, such as *_fid_stats.pth.")] = None,
    save_stats: Annotated[Path | None, Option(help="Write the statistics of --images to this file.")] = None,
    paired: Annotated[int, Option(min=0, help="Samples to compare with the sequential loop's.")] = 64,
    test_images: Annotated[int, Option(min=0, help="Images of --images' test split for likelihoods.")] = 1000,
    batch_size: shared.ImagesAtATime = 64,
    seed: shared.Seed = 0,
    device: shared.Device = "auto",
    dtype: shared.Dtype = "float32",
    out: Annotated[Path, Option(help="Folder for evaluation.json.")] = Path("out/evaluation"),
) -> dict[str, Any]:
    """Score a model and its samples.

    FID of the samples, their error and certificates, and the model's likelihood of test images.

    Example: jacobiflow evaluate --model fashion-p2 --samples out/demo --images fashion-512
    """
    from jacobiflow import files

    shared.check_output("--save-stats", save_stats, model, images, stats, inception, samples, features, outputs=(out,))
    files.check_own(out, "evaluation")
    features = features or ("none" if images is None and stats is None else "inception")
    if samples is None and images is None:
        raise InputValueError("nothing to evaluate: give --samples, a folder that jacobiflow sample wrote, or --images")
    if save_stats is not None and (images is None or features == "none"):
        raise InputValueError(f"--save-stats {save_stats}: give --images and --features, whose statistics they are")
    if features != "none" and images is None and stats is None:
        raise InputValueError(f"--features {features}: give --images or --stats, to compare with")
    flow = shared.load_model(model, device, dtype)
    flow.require_images()
    folder = None if samples is None else _open_samples(samples, flow)
    test = None if images is None or not test_images else _test_images(flow, images, test_images)
    results: dict[str, Any] = {"model": model, "samples": None if samples is None else str(samples)}
    with progress_bar() as progress:
        if features != "none" and (folder is not None or save_stats is not None):
            results |= _distances(flow, folder, features, inception, images, stats, save_stats, progress)
        if folder is not None:
            results |= _certificates(folder)
            if paired:
                results |= _paired(folder, flow, min(paired, folder.manifest.num), batch_size)
        if test is not None:
            results |= _likelihood(flow, test, seed, batch_size, progress)
    with files.own_folder(out, "evaluation", (_TABLE,)):
        files.write_json(out / _TABLE, results)
    show_table(("score", "value", ""), _rows(results), text=(0, 2))
    print(f"wrote {out / _TABLE}")
    return results


def _rows(results: dict[str, Any]) -> list[list[str]]:
    """The rows of the scores that were computed."""
    rows = []
    for score in _SCORES:
        try:
            rows.append([part.format(**results) for part in score])
        except KeyError:
            continue
    return rows


def _open_samples(path: Path, flow: Flow) -> jf.SampleFolder:
    """Opens samples. Raises ValueError if they are not whole, or not of this flow."""
    from jacobiflow.flows.fingerprint import check_fingerprint

    folder = jf.SampleFolder.open(path)
    check_fingerprint(folder.manifest.fingerprint, flow, f"--samples {path}: drawn from", "give that one as --model")
    for problem in folder.problems():
        raise InputValueError(problem)
    return folder


def _distances(
    flow: Flow, folder: jf.SampleFolder | None, name: str, inception: Path | None, images: str | None,
    stats: Path | None, save_stats: Path | None, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Fréchet distance to real images; with their features, kernel distance, precision and recall too."""
    from jacobiflow import evaluation
    from jacobiflow.evaluation.distances import SMALLEST

    extractor = evaluation.load_features(name, inception)
    real = None if images is None else evaluation.extract(extractor, [_real_images(flow, extractor, images)], progress)
    statistics = None if real is None else evaluation.Statistics.of(real)
    if save_stats is not None and statistics is not None:
        save_stats.parent.mkdir(parents=True, exist_ok=True)
        statistics.save(save_stats, extractor if isinstance(extractor, evaluation.InceptionFeatures) else None)
        print(f"wrote {save_stats}: statistics of {statistics.num:,} images")
    if stats is not None:
        statistics = evaluation.Statistics.load(stats)
    if folder is None or statistics is None:
        return {}
    fake = evaluation.extract(extractor, folder.batches(), progress, folder.manifest.num)
    distance = evaluation.frechet_distance(statistics, evaluation.Statistics.of(fake))
    results = {
        "features": name, "num": len(fake), "frechet_distance": distance,
        "against": f"the training split of {images}" if stats is None else str(stats),
    }  # fmt: skip
    if real is not None and min(len(real), len(fake)) >= SMALLEST:
        kernel, std = evaluation.kernel_distance(real[:_FEW], fake[:_FEW])
        precision, recall = evaluation.precision_recall(real[:_FEW], fake[:_FEW])
        results |= {"kernel_distance": kernel, "kernel_distance_std": std, "precision": precision, "recall": recall}
    return results


def _real_images(flow: Flow, extractor: FeatureFunction, source: str) -> Tensor:
    """The training split; for Inception a random half is mirrored, as in the original's data loader."""
    import torch

    from jacobiflow import data, evaluation

    images = data.load_images(source, *shared.image_size(flow)).images
    if not isinstance(extractor, evaluation.InceptionFeatures):
        return images
    extractor.to(flow.var.device)
    is_mirrored = torch.rand(len(images), generator=torch.Generator().manual_seed(0)) < 0.5
    return torch.where(is_mirrored.view(-1, 1, 1, 1), images.flip(-1), images)


def _certificates(folder: jf.SampleFolder) -> dict[str, Any]:
    """The samples that were solved again or lost, and the certificates if they were measured."""
    results: dict[str, Any] = {
        "resolved_sequentially": int(folder.resolved().sum()), "lost": int(folder.lost().sum())
    }  # fmt: skip
    certificate = folder.certificate()
    if certificate is not None:
        results["certificates"] = {"median": float(certificate.median()), "max": float(certificate.max())}
    return results


def _paired(folder: jf.SampleFolder, flow: Flow, num: int, batch_size: int) -> dict[str, Any]:
    """The first samples against the sequential loop's at the same latents."""
    import torch

    from jacobiflow import data, evaluation, latents

    manifest, config = folder.manifest, flow.config
    if flow.reads_text and manifest.context_sha256 is not None:
        raise InputValueError("--paired: these samples have texts, which the folder does not hold; give --paired 0")
    shards = range(-(-num // manifest.shard_size))
    stored = torch.cat([folder.images(i) for i in shards])[:num]
    labels = [part for i in shards if (part := folder.labels(i)) is not None]
    draw = partial(
        jf.sample, flow, labels=torch.cat(labels)[:num] if labels else None,
        settings=jf.SamplingSettings(manifest.guidance, manifest.denoise),
        latents=latents.draw_latents(num, config.num_tokens, config.token_channels, manifest.seed),
        certify=manifest.certify, batch_size=batch_size,
    )  # fmt: skip
    exact = draw(strategy="sequential").images.cpu()
    errors = evaluation.fidelity(draw(strategy=folder.strategy()).images.cpu(), exact)
    return {
        "paired": asdict(errors),
        "stored": asdict(evaluation.pixel_difference(stored, data.quantize(exact))),
    }


def _test_images(flow: Flow, source: str, num: int) -> ImageDataset:
    """The first `num` test images, after a check that the flow has their classes."""
    from jacobiflow.data import load_images

    data = load_images(source, *shared.image_size(flow), "test")
    labels = None if data.labels is None else data.labels[:num]
    if flow.config.num_classes and labels is not None:
        flow.check_labels(labels, len(labels))
    return replace(data, images=data.images[:num], labels=labels)


def _likelihood(flow: Flow, test: ImageDataset, seed: int, batch_size: int, progress: Progress) -> dict[str, Any]:
    """Bits per dimension and class accuracy of test images, with the noise of the flow's training."""
    from jacobiflow import evaluation

    noise = shared.training_noise(flow)
    name = "bits_per_dim" if noise.kind == "uniform" else "bits_per_dim_noisy"
    results = {"test_images": len(test), name: evaluation.bits_per_dim(flow, test, noise, seed, batch_size, progress)}
    if flow.config.num_classes and test.labels is not None:
        results["bayes_accuracy"] = evaluation.bayes_accuracy(flow, test, noise, seed, batch_size, progress)
    return results
