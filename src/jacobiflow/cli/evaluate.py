"""`jacobiflow evaluate`: scores of a model and its samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

import jacobiflow as jf
from jacobiflow.cli import shared
from jacobiflow.cli.shared import progress_bar, show_table
from jacobiflow.errors import InputValueError

if TYPE_CHECKING:
    from torch import Tensor

    from jacobiflow.data import ImageDataset, Split
    from jacobiflow.evaluation.features import FeatureFunction
    from jacobiflow.models.flow import Flow
    from jacobiflow.utils.progress import Progress

_FEW = 10_000  # images on either side of what compares each with each
_TABLE = "evaluation.json"
_KINDS = {"train": "training images", "test": "test images"}
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
    ("largest error", "{paired[max]:.1e}", "{paired[num]:,} samples, against the sequential loop"),
    ("RMS error", "{paired[rms]:.1e}", "the same"),
    ("PSNR", "{paired[psnr]:.1f} dB", "the same"),
    ("sensitivity", "{sensitivity:.1e}", "largest change of the sequential loop's samples by rounding"),
    ("8-bit pixels", "{stored[share]:.3%}", "of the stored images differ, by {stored[levels]} at most"),
    ("bits per dimension", "{bits_per_dim:.3f}", "{likelihood_images}, uniformly dequantised"),
    ("bits per dimension", "{bits_per_dim_noisy:.3f}", "{likelihood_images}, with the noise of training"),
    ("class accuracy", "{bayes_accuracy:.1%}", "by Bayes' rule; the same images"),
)
_Scores = dict[str, Callable[[], dict[str, Any]]]  # functions that compute entries of the results, by name


def evaluate(
    model: shared.Model = "fashion-p2",
    samples: Annotated[Path | None, Option(help="A folder that jacobiflow sample wrote.")] = None,
    images: Annotated[str | None, Option(help=f"Real images to compare with: {shared.SOURCES}")] = None,
    features: Annotated[str | None, Option(help=_FEATURES)] = None,
    inception: Annotated[Path | None, Option(help="File of Inception's weights. Default: it is downloaded.")] = None,
    stats: Annotated[Path | None, Option(help="Statistics to compare with, such as *_fid_stats.pth.")] = None,
    save_stats: Annotated[Path | None, Option(help="Write the statistics of --images to this file.")] = None,
    paired: Annotated[int, Option(min=0, help="Samples to compare with the sequential loop's.")] = 64,
    test_images: Annotated[int, Option(min=0, help="Images for likelihoods, of the test split if any.")] = 1000,
    batch_size: shared.ImagesAtATime = 64,
    seed: shared.Seed = 0,
    device: shared.Device = "auto",
    dtype: shared.Dtype = "float32",
    out: Annotated[Path, Option(help="Folder for evaluation.json.")] = Path("out/evaluation"),
) -> dict[str, Any]:
    """Score a model and its samples.

    FID of the samples, their error and certificates, and the model's likelihood of test images. The same command again
    goes on after an interruption.

    Example: jacobiflow evaluate --model fashion-p2 --samples out/demo --images fashion-mnist
    """
    from jacobiflow import evaluation
    from jacobiflow.utils import files

    shared.check_output("--save-stats", save_stats, model, images, stats, inception, samples, features, outputs=(out,))
    files.check_own(out, "evaluation")
    for option, value in (("--features", features), ("--stats", stats)):
        if samples is None and save_stats is None and value not in (None, "none"):
            raise InputValueError(f"{option} {value}: give --samples, too, or leave it out")
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
    results: dict[str, Any] = {"model": model, "samples": samples and str(samples), "batch_size": batch_size}
    scores: _Scores = {}
    real = test = None
    with progress_bar() as progress:
        if folder is not None:
            outcome, certificate = folder.outcome(), folder.certificate()
            results |= {
                "num": outcome.num, "outcome": str(outcome), "used_fallback": outcome.num_fallback,
                "above": outcome.num_above, "lost": outcome.num_nonfinite,
            }  # fmt: skip
            if certificate is not None:
                results["certificates"] = {"median": float(certificate.median()), "max": float(certificate.max())}
        if folder is not None and paired:
            scores["errors"] = _errors(folder, flow, min(paired, folder.manifest.num), batch_size)
        if images is not None and test_images:
            test, kind = _load_images(images, flow, "test", test_images)
            results["likelihood_images"] = f"{len(test):,} {kind} of {images}"
            results |= {"test_images": len(test)} if kind == _KINDS["test"] else {}
            scores |= _likelihood(flow, test, seed, batch_size, progress)
        if features != "none" and (folder is not None or save_stats is not None):
            if images is not None:
                real, kind = _load_images(images, flow, "train")
            results |= {"features": features, "against": f"{kind} of {images}" if stats is None else str(stats)}
            extractor = evaluation.load_features(features, inception)
            scores |= _distances(flow, extractor, folder, real, stats, save_stats, progress)
        paths = (Path(features.rpartition(":")[0]), inception, stats)
        results["inputs"] = _digest((features, paired, seed), flow, folder, (real, test), paths)
        with files.output_directory(out, "evaluation", (_TABLE,)):
            earlier = files.read_object(out / _TABLE) or {}
            if earlier.get("inputs") == results["inputs"] and (save_stats is None or save_stats.exists()):
                if earlier["batch_size"] != batch_size:  # which changes errors by rounding
                    earlier["computed"] = [name for name in earlier["computed"] if name != "errors"]
                results = earlier | results
            _compute(scores, results, out / _TABLE)
    if folder is not None:
        print(results["outcome"])
        if results["lost"]:
            print("lost samples are stored as black images, which count in the scores")
    show_table(("score", "value", ""), _rows(results), text=(0, 2))
    print(f"wrote {out / _TABLE}")
    return results


def _compute(scores: _Scores, results: dict[str, Any], table: Path) -> None:
    """Computes the scores that the results lack, and writes the results after each."""
    from jacobiflow.utils import files

    computed = results.setdefault("computed", [])
    if computed:
        print(f"computed by an earlier run: {', '.join(computed)}")
    files.write_json(table, results)
    for name in [name for name in scores if name not in computed]:
        results |= scores[name]()
        computed.append(name)
        files.write_json(table, results)


def _digest(
    options: tuple[Any, ...], flow: Flow, folder: jf.SampleFolder | None, images: tuple[ImageDataset | None, ...],
    paths: tuple[Path | None, ...],
) -> str:  # fmt: skip
    """Returns what identifies the inputs of the scores: a digest of options, weights, samples, images and files."""
    from jacobiflow.models.checkpoints.fingerprint import cached_fingerprint
    from jacobiflow.utils import files

    settings = [
        jf.__version__,
        *options,
        cached_fingerprint(flow),
        repr(flow.config),
        flow.precision,
        flow.var.device.type,
    ]
    manifest = None if folder is None else folder.path / files.MANIFEST
    tensors = [tensor for data in images if data is not None for tensor in (data.images, data.labels)]
    return files.sha256(
        files.json_bytes(settings), *(path for path in (manifest, *paths) if path is not None and path.is_file()),
        *(tensor.numpy().tobytes() for tensor in tensors if tensor is not None),
    )  # fmt: skip


def _rows(results: dict[str, Any]) -> list[list[str]]:
    """The rows of the scores that were computed."""
    rows = []
    for score in _SCORES:
        try:
            rows.append([part.format(**results) for part in score])
        except (KeyError, TypeError):  # TypeError: a NaN, which an earlier run stored as null
            continue
    return rows


def _open_samples(path: Path, flow: Flow) -> jf.SampleFolder:
    """Opens samples. Raises ValueError if they are not whole, or not of this flow."""
    from jacobiflow.models.checkpoints.fingerprint import check_fingerprint

    folder = jf.SampleFolder.open(path)
    check_fingerprint(folder.manifest.fingerprint, flow, f"--samples {path}: drawn from", "give that one as --model")
    for problem in folder.problems():
        raise InputValueError(problem)
    return folder


def _load_images(source: str, flow: Flow, split: Split, num: int | None = None) -> tuple[ImageDataset, str]:
    """Loads the first images of a split, or of a source without that split; also returns their kind, in words."""
    from jacobiflow import data

    splits = data.available_splits(source)
    split = split if split in splits else "train"
    images = data.load_images(source, *shared.image_size(flow), split)
    labels = None if images.labels is None or not flow.config.num_classes else images.labels[:num]
    return replace(images, images=images.images[:num], labels=labels), _KINDS[split] if split in splits else "images"


def _distances(
    flow: Flow, extractor: FeatureFunction, folder: jf.SampleFolder | None, real: ImageDataset | None,
    stats: Path | None, save_stats: Path | None, progress: Progress,
) -> _Scores:  # fmt: skip
    """Fréchet distance to real images; with their features, kernel distance, precision and recall too."""
    from torch import nn

    from jacobiflow import evaluation
    from jacobiflow.evaluation.distances import SMALLEST
    from jacobiflow.evaluation.features import need_extra

    if isinstance(extractor, nn.Module):
        extractor.to(flow.var.device)
    images = [] if real is None else [_mirrored(real.images, extractor)]
    real_features = cache(partial(evaluation.extract, extractor, images, progress))
    scores: _Scores = {}
    if save_stats is not None:

        def save_statistics() -> dict[str, Any]:
            save_stats.parent.mkdir(parents=True, exist_ok=True)
            inception = extractor if isinstance(extractor, evaluation.InceptionFeatures) else None
            evaluation.Statistics.of(real_features()).save(save_stats, inception)
            print(f"wrote {save_stats}: statistics of {len(images[0]):,} images")
            return {}

        scores["statistics"] = save_statistics
    if folder is None:
        return scores
    statistics = None if stats is None else evaluation.Statistics.load(stats)
    num, num_real = folder.manifest.num, len(images[0]) if statistics is None else statistics.num
    if min(num, num_real) < 2:
        raise InputValueError(f"a distance between {num_real} images and {num} samples: give at least 2 of each")
    width = evaluation.extract(extractor, [folder.images(0)[:1]]).shape[1]  # tries the function before hours of work
    if statistics is not None and len(statistics.sum) != width:
        raise InputValueError(f"--stats {stats}: of {len(statistics.sum)} features, but --features gives {width}")
    features = cache(partial(evaluation.extract, extractor, folder.batches(), progress, num))

    def frechet_distance() -> dict[str, Any]:
        against = evaluation.Statistics.of(real_features()) if statistics is None else statistics
        return {"frechet_distance": evaluation.frechet_distance(against, evaluation.Statistics.of(features()))}

    def kernel_distance() -> dict[str, Any]:
        few = real_features()[:_FEW], features()[:_FEW]
        kernel, std = evaluation.kernel_distance(*few)
        precision, recall = evaluation.precision_recall(*few)
        return {"kernel_distance": kernel, "kernel_distance_std": std, "precision": precision, "recall": recall}

    scores["FID"] = frechet_distance
    if images and min(num, len(images[0])) >= SMALLEST:
        need_extra("the kernel distance")
        scores["kernel distance, precision and recall"] = kernel_distance
    return scores


def _mirrored(images: Tensor, extractor: FeatureFunction) -> Tensor:
    """For Inception a random half of real images is mirrored, as in the original's data loader."""
    import torch

    from jacobiflow import evaluation

    if not isinstance(extractor, evaluation.InceptionFeatures):
        return images
    is_mirrored = torch.rand(len(images), generator=torch.Generator().manual_seed(0)) < 0.5
    return torch.where(is_mirrored.view(-1, 1, 1, 1), images.flip(-1), images)


def _errors(folder: jf.SampleFolder, flow: Flow, num: int, batch_size: int) -> Callable[[], dict[str, Any]]:
    """The first samples against the sequential loop's at the same latents."""
    import torch

    from jacobiflow import data, evaluation
    from jacobiflow.models import latents

    manifest, config = folder.manifest, flow.config
    shards = range(-(-num // manifest.shard_size))
    labels = [part for i in shards if (part := folder.labels(i)) is not None]
    if manifest.context_sha256 is not None and not labels:
        raise InputValueError("--paired: the samples' texts or numbers are not in the folder; give --paired 0")

    def errors() -> dict[str, Any]:
        draw = partial(
            jf.sample, flow, labels=torch.cat(labels)[:num] if labels else None,
            settings=jf.SamplingSettings(manifest.guidance, manifest.denoise),
            latents=latents.draw_latents(num, config.num_tokens, config.token_channels, manifest.seed),
            certify=manifest.certify, batch_size=batch_size,
        )  # fmt: skip
        sequential = draw(strategy="sequential", sensitivity=True)
        exact = sequential.images.cpu()
        stored = torch.cat([folder.images(i) for i in shards])[:num]
        return {
            "paired": asdict(evaluation.fidelity(draw(strategy=folder.strategy()).images.cpu(), exact)),
            "stored": asdict(evaluation.pixel_difference(stored, data.quantize(exact))),
            "sensitivity": sequential.outcome.sensitivity,
        }

    return errors


def _likelihood(flow: Flow, test: ImageDataset, seed: int, batch_size: int, progress: Progress) -> _Scores:
    """Bits per dimension and class accuracy, with the noise of the flow's training."""
    from jacobiflow import evaluation

    flow.check_context(test.labels, len(test))
    noise = shared.training_noise(flow)
    name = "bits_per_dim" if noise.kind == "uniform" else "bits_per_dim_noisy"
    arguments = (flow, test, noise, seed, batch_size, progress)
    scores: _Scores = {"bits per dimension": lambda: {name: evaluation.bits_per_dim(*arguments)}}
    if test.labels is not None:
        scores["class accuracy"] = lambda: {"bayes_accuracy": evaluation.bayes_accuracy(*arguments)}
    return scores
