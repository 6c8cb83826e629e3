"""`jacobiflow evaluate`: scores of a model and its samples."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

import jacobiflow as jf
from jacobiflow.cli import loading, options, output_files
from jacobiflow.cli.output import progress_bar, show_table
from jacobiflow.errors import InputValueError

if TYPE_CHECKING:
    from jacobiflow.cli.scoring import Scores
    from jacobiflow.data import ImageDataset, Split
    from jacobiflow.models.flow import Flow

_TABLE = "evaluation.json"
_SPLIT_NAMES = {"train": "training images", "test": "test images"}
_FEATURES = (
    "inception (FID), or FILE.py:FUNCTION for a function from 8-bit images (N, C, H, W) to features (N, d); or none. "
    "Default: inception, if there are real images."
)
# The rows of the table: the entry of the results that a row needs, then its label, value and remark.
_ROWS = (
    ("frechet_distance", "FID of {features}", "{frechet_distance:.4f}", "{num:,} samples against {against}"),
    ("kernel_distance", "kernel distance", "{kernel_distance:.5f}", "+-{kernel_distance_std:.5f} over subsets"),
    ("precision", "precision", "{precision:.3f}", ""),
    ("recall", "recall", "{recall:.3f}", ""),
    ("residuals", "residual", "{residuals[max]:.1e}", "largest; median {residuals[median]:.1e}"),
    ("paired", "largest error", "{paired[max]:.1e}", "{paired[num]:,} samples, against the exact loop"),
    ("paired", "RMS error", "{paired[rms]:.1e}", "the same"),
    ("paired", "PSNR", "{paired[psnr]:.1f} dB", "the same"),
    ("sensitivity", "sensitivity", "{sensitivity:.1e}", "largest change of the exact loop's samples by rounding"),
    ("stored", "8-bit pixels", "{stored[share]:.3%}", "of the stored images differ, by {stored[levels]} at most"),
    ("bits_per_dim", "bits per dimension", "{bits_per_dim:.3f}", "{likelihood_images}, uniformly dequantised"),
    ("bits_per_dim_noisy", "bits per dimension", "{bits_per_dim_noisy:.3f}",
     "{likelihood_images}, with the noise of training"),
    ("bayes_accuracy", "class accuracy", "{bayes_accuracy:.1%}", "by Bayes' rule; the same images"),
)  # fmt: skip


def evaluate(
    model: options.Model = "fashion-p2",
    samples: Annotated[Path | None, Option(help="A folder that jacobiflow sample wrote.")] = None,
    images: Annotated[str | None, Option(help=f"Real images to compare with: {options.SOURCES}")] = None,
    features: Annotated[str | None, Option(help=_FEATURES)] = None,
    inception: Annotated[Path | None, Option(help="File of Inception's weights. Default: it is downloaded.")] = None,
    stats: Annotated[Path | None, Option(help="Statistics to compare with, such as *_fid_stats.pth.")] = None,
    save_stats: Annotated[Path | None, Option(help="Write the statistics of --images to this file.")] = None,
    paired: Annotated[int, Option(min=0, help="Samples to compare with the exact loop's.")] = 64,
    test_images: Annotated[int, Option(min=0, help="Images for likelihoods, of the test split if any.")] = 1000,
    batch_size: options.NetworkBatchSize = 64,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    out: Annotated[Path, Option(help="Folder for evaluation.json.")] = Path("out/evaluation"),
) -> dict[str, Any]:
    """Score a model and its samples.

    FID of the samples, their errors and residuals, and the model's likelihood of test images. The same command again
    resumes after an interruption.

    Example: jacobiflow evaluate --model fashion-p2 --samples out/demo --images fashion-mnist
    """
    from jacobiflow import evaluation
    from jacobiflow.cli import scoring
    from jacobiflow.utils import files

    inputs = (images, stats, inception, samples, features)
    output_files.check_output("--save-stats", save_stats, model, *inputs, outputs=(out,))
    files.check_own(out, "evaluation")
    features = _check_options(samples, images, features, stats, save_stats)
    flow = loading.load_model(model, device, dtype)
    flow.require_images()
    folder = None if samples is None else _open_samples(samples, flow)
    results: dict[str, Any] = {"model": model, "samples": samples and str(samples), "batch_size": batch_size}
    scores: Scores = {}
    real = test = None
    with progress_bar() as progress:
        if folder is not None:
            results |= _describe(folder)
            if paired:
                scores["errors"] = scoring.paired_errors(folder, flow, min(paired, folder.manifest.num), batch_size)
        if images is not None and test_images:
            test, kind = _load_images(images, flow, "test", test_images)
            results["likelihood_images"] = f"{len(test):,} {kind} of {images}"
            results |= {"test_images": len(test)} if kind == _SPLIT_NAMES["test"] else {}
            scores |= scoring.likelihood(flow, test, seed, batch_size, progress)
        if features != "none" and (folder is not None or save_stats is not None):
            if images is not None:
                real, kind = _load_images(images, flow, "train")
            results |= {"features": features, "against": f"{kind} of {images}" if stats is None else str(stats)}
            extractor = evaluation.load_features(features, inception)
            scores |= scoring.distances(flow, extractor, folder, real, stats, save_stats, progress)
        input_files = (Path(features.rpartition(":")[0]), inception, stats)
        results["inputs"] = scoring.digest((features, paired, seed), flow, folder, (real, test), input_files)
        with files.output_directory(out, "evaluation", (_TABLE,)):
            if save_stats is None or save_stats.exists():
                results = _earlier_scores(out / _TABLE, results) | results
            _compute(scores, results, out / _TABLE)
    if folder is not None:
        print(results["outcome"])
        if results["num_nonfinite"]:
            print("samples that overflowed are stored as black images, which count in the scores")
    rows = [[part.format(**results) for part in row] for entry, *row in _ROWS if entry in results]
    show_table(("score", "value", ""), rows, text=(0, 2))
    print(f"wrote {out / _TABLE}")
    return results


def _check_options(
    samples: Path | None, images: str | None, features: str | None, stats: Path | None, save_stats: Path | None
) -> str:
    """Raises ValueError for options that lack others; returns `--features` or its default."""
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
    return features


def _open_samples(path: Path, flow: Flow) -> jf.SampleFolder:
    """Opens a folder of samples; raises ValueError if it is incomplete, or of another flow."""
    from jacobiflow.models.checkpoints.fingerprint import check_fingerprint

    folder = jf.SampleFolder.open(path)
    check_fingerprint(folder.manifest.fingerprint, flow, f"--samples {path}: drawn from", "give that one as --model")
    for problem in folder.problems():
        raise InputValueError(problem)
    return folder


def _describe(folder: jf.SampleFolder) -> dict[str, Any]:
    """Returns what the folder says of its samples."""
    outcome, residual = folder.outcome(), folder.residual()
    results: dict[str, Any] = {
        "num": outcome.num, "outcome": str(outcome), "num_fallback": outcome.num_fallback,
        "num_above": outcome.num_above, "num_nonfinite": outcome.num_nonfinite,
    }  # fmt: skip
    if residual is not None:
        results["residuals"] = {"median": float(residual.median()), "max": float(residual.max())}
    return results


def _load_images(source: str, flow: Flow, split: Split, num: int | None = None) -> tuple[ImageDataset, str]:
    """Loads the first images of a split, or of a source without splits; also returns the name of the split."""
    from jacobiflow import data

    splits = data.available_splits(source)
    split = split if split in splits else "train"
    images = data.load_images(source, *loading.image_size(flow), split)
    labels = None if images.labels is None or not flow.config.num_classes else images.labels[:num]
    name = _SPLIT_NAMES[split] if split in splits else "images"
    return replace(images, images=images.images[:num], labels=labels), name


def _earlier_scores(table: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Returns the results of an earlier run with the same inputs, or an empty dict."""
    from jacobiflow.utils import files

    earlier = files.read_object(table) or {}
    if earlier.get("inputs") != results["inputs"]:
        return {}
    if earlier["batch_size"] != results["batch_size"]:  # The batch size changes errors by rounding.
        earlier["computed"] = [name for name in earlier["computed"] if name != "errors"]
    return {name: math.nan if value is None else value for name, value in earlier.items()}


def _compute(scores: Scores, results: dict[str, Any], table: Path) -> None:
    """Computes the scores that the results lack, and writes the results after each score."""
    from jacobiflow.utils import files

    computed = results.setdefault("computed", [])
    if computed:
        print(f"computed by an earlier run: {', '.join(computed)}")
    files.write_json(table, results)
    for name in [name for name in scores if name not in computed]:
        results |= scores[name]()
        computed.append(name)
        files.write_json(table, results)
