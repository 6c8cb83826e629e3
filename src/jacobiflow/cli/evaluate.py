"""`jacobiflow evaluate`: scores of a model and its samples."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

import jacobiflow as jf
from jacobiflow.cli import loading, options, output_files
from jacobiflow.cli.output import format_count, progress_bar, show_table
from jacobiflow.errors import InputValueError

if TYPE_CHECKING:
    from jacobiflow.data import ImageDataset, Split
    from jacobiflow.evaluation.job import EvaluationJob, EvaluationResult
    from jacobiflow.models.flow import Flow

_SPLIT_NAMES = {"train": "training images", "test": "test images"}
# The rows of the table: the score that a row needs, then its label, value and remark.
_ROWS = (
    ("frechet_distance", "FID of {r.features}", "{s.frechet_distance:.4f}",
     "{r.samples.num:,} samples against {r.against}"),
    ("kernel_distance", "kernel distance", "{s.kernel_distance:.5f}", "+-{s.kernel_distance_std:.5f} over subsets"),
    ("precision", "precision", "{s.precision:.3f}", ""),
    ("recall", "recall", "{s.recall:.3f}", ""),
    ("median_residual", "residual", "{r.samples.residual:.1e}", "largest; median {r.median_residual:.1e}"),
    ("paired", "largest error", "{s.paired.max:.1e}", "{s.paired.num:,} samples, against the exact loop"),
    ("paired", "RMS error", "{s.paired.rms:.1e}", "the same"),
    ("pixels", "PSNR", "{s.paired.psnr:.1f} dB", "the same"),
    ("sensitivity", "sensitivity", "{s.sensitivity:.1e}", "largest change of the exact loop's samples by rounding"),
    ("pixels", "8-bit pixels", "{s.paired.pixels.share:.3%}",
     "of the stored images differ, by {s.paired.pixels.levels} at most"),
    ("bits_per_dim", "bits per dimension", "{s.bits_per_dim:.3f}",
     "{r.test_images:,} {r.likelihood_images}, uniformly dequantised"),
    ("bits_per_dim_noisy", "bits per dimension", "{s.bits_per_dim_noisy:.3f}",
     "{r.test_images:,} {r.likelihood_images}, with the noise of training"),
    ("bayes_accuracy", "class accuracy", "{s.bayes_accuracy:.1%}", "by Bayes' rule; the same images"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(options.Config):
    """Score a model and its samples.

    FID of the samples, their errors and residuals, and the model's likelihood of test images. The same command again
    resumes after an interruption. Several processes that run the same command share the work.

    Example: jacobiflow evaluate --model fashion-p2 --samples out/demo --images fashion-mnist

    Attributes:
        samples: A folder that jacobiflow sample wrote.
        features: inception (FID), or FILE.py:FUNCTION for a function from 8-bit images (N, C, H, W) to features (N, d);
            or none. Default: inception, if there are real images.
        inception: File of Inception's weights. Default: it is downloaded.
        stats: Statistics to compare with, such as *_fid_stats.pth.
        save_stats: Write the statistics of --images to this file.
        paired: Number of samples to compare with those of the exact loop.
        test_images: Number of images whose likelihood is measured, evenly spaced in the test split if there is one.
        overwrite: Replace the scores in the folder.
        out: Folder for evaluation.json.
    """

    model: options.Model = "fashion-p2"
    samples: Annotated[Path | None, options.MODEL] = None
    images: Annotated[str | None, options.DATA, Parameter(help=f"Real images to compare with: {options.SOURCES}")] = (
        None
    )
    features: Annotated[str | None, options.MEASUREMENT] = None
    inception: Annotated[Path | None, options.MEASUREMENT] = None
    stats: Annotated[Path | None, options.MEASUREMENT] = None
    save_stats: Annotated[Path | None, options.OUTPUT] = None
    paired: Annotated[int, options.MEASUREMENT, options.within(0)] = 64
    test_images: Annotated[int, options.MEASUREMENT, options.within(0)] = 1000
    batch_size: options.NetworkBatchSize = 64
    seed: options.Seed = 0
    device: options.Device = "auto"
    dtype: options.Dtype = "float32"
    overwrite: Annotated[options.Flag, options.OUTPUT] = False
    out: Annotated[Path, options.OUTPUT] = Path("out/evaluation")


def run(config: EvaluateConfig) -> EvaluationResult | None:
    """Computes the scores that are not in the folder yet."""
    features = _check_options(config)
    from jacobiflow import jobs
    from jacobiflow.evaluation.job import EvaluationJob, EvaluationResult
    from jacobiflow.jobs.launch import find_launch
    from jacobiflow.utils import serialization

    store = EvaluationJob.store(config.out)
    store.read_spec()  # Refuses a folder of other files, before anything is loaded.
    job = _make_job(config, features)
    with progress_bar(is_shown=find_launch().rank == 0) as progress:
        completed = jobs.run(job, config.out, overwrite=config.overwrite, progress=progress)
    if not completed.should_print:
        print(f"another process has completed {config.out / job.result_name}")
        return None
    if config.save_stats is not None:
        job.save_statistics(store, config.save_stats)
    print(f"wrote {config.out / job.result_name}")
    return serialization.decode(EvaluationResult, completed.result)


def _check_options(config: EvaluateConfig) -> str:
    """Raises InputValueError for options that lack others; returns `--features` or its default."""
    samples, images, stats, save_stats = config.samples, config.images, config.stats, config.save_stats
    if samples is not None and not samples.is_dir():
        command = shlex.join(("jacobiflow", "sample", "--model", config.model, "--out", str(samples)))
        raise InputValueError(f"--samples {samples}: no such folder; draw samples first: {command}")
    for option, value in (("--features", config.features), ("--stats", stats)):
        if samples is None and save_stats is None and value not in (None, "none"):
            raise InputValueError(f"{option} {value}: give --samples, too, or leave it out")
    features = config.features or ("none" if images is None and stats is None else "inception")
    if samples is None and images is None:
        raise InputValueError("nothing to evaluate: give --samples, a folder that jacobiflow sample wrote, or --images")
    if save_stats is not None and (images is None or features == "none"):
        raise InputValueError(f"--save-stats {save_stats}: give --images and --features, whose statistics they are")
    if features != "none" and images is None and stats is None:
        raise InputValueError(f"--features {features}: give --images or --stats, to compare with")
    inputs = (images, stats, config.inception, samples, config.features)
    output_files.check_output("--save-stats", save_stats, config.model, config.out, *inputs)
    return features if samples is not None or save_stats is not None else "none"


def _make_job(config: EvaluateConfig, features: str) -> EvaluationJob:
    """Loads all that the scores need, and checks that it fits together."""
    from torch import nn

    from jacobiflow.evaluation import FeatureStatistics, load_features
    from jacobiflow.evaluation.job import EvaluationJob, EvaluationSpec
    from jacobiflow.jobs.launch import local_device
    from jacobiflow.models.checkpoints.fingerprint import fingerprint
    from jacobiflow.utils import files

    flow = loading.load_model(config.model, local_device(loading.pick_device(config.device)), config.dtype)
    samples = None if config.samples is None else _open_samples(config.samples, flow)
    real = test = function = against = likelihood_images = None
    if config.images is not None and config.test_images:
        test, likelihood_images = _load_images(config.images, flow, "test", config.test_images)
        flow.check_context(test.labels, len(test))
    if features != "none":
        flow.require_images()
        if config.images is not None:
            real, against = _load_images(config.images, flow, "train")
        function = load_features(features, config.inception)
        if isinstance(function, nn.Module):
            function.to(flow.var.device)
        else:
            function = loading.naming_errors("--features")(function)
    paths = (Path(features.rpartition(":")[0]), config.inception, config.stats)
    checksums = "".join(images.sha256() for images in (real, test) if images is not None)
    spec = EvaluationSpec(
        model=config.model,
        weights_sha256=files.sha256(f"{fingerprint(flow)} {flow.config}".encode()),
        dtype=flow.precision,
        batch_size=config.batch_size,
        seed=config.seed,
        samples_sha256=None if samples is None else samples.sha256(),
        paired=0 if samples is None else min(config.paired, samples.spec.num),
        features=features,
        features_sha256=files.sha256(*(path for path in paths if path is not None and path.is_file())),
        against=against if config.stats is None else str(config.stats),
        test_images=0 if test is None else len(test),
        likelihood_images=likelihood_images,
        images_sha256=files.sha256(checksums.encode()),
    )
    statistics = None if config.stats is None else FeatureStatistics.load(config.stats)
    return EvaluationJob(spec, flow, samples, real, test, function, statistics)


def _open_samples(path: Path, flow: Flow) -> jf.SampleFolder:
    """Opens a folder of samples; raises InputValueError if it is incomplete, or of another flow."""
    from jacobiflow.models.checkpoints.fingerprint import check_fingerprint

    folder = jf.SampleFolder.open(path)
    check_fingerprint(folder.spec.weights_sha256, flow, f"--samples {path}: drawn from", "give that one as --model")
    for problem in folder.problems():
        raise InputValueError(problem)
    return folder


def _load_images(source: str, flow: Flow, split: Split, num: int | None = None) -> tuple[ImageDataset, str]:
    """Loads a split, or a source without splits, or `num` evenly spaced images of it; also returns its name."""
    from jacobiflow import data

    splits = data.available_splits(source)
    split = split if split in splits else "train"
    images = data.load_images(source, *loading.image_size(flow), split)
    if not flow.config.num_classes:
        images = replace(images, labels=None)
    if num is not None and num < len(images):
        images = images.evenly_spaced(num)  # The first ones of a folder would be of one class.
    return images, f"{_SPLIT_NAMES[split] if split in splits else 'images'} of {source}"


def show(config: EvaluateConfig, result: EvaluationResult) -> None:
    """Prints the scores as a table."""
    if result.samples is not None:
        print(result.samples)
        if result.samples.num_nonfinite:
            print("samples that overflowed are stored as black images, which count in the scores")
    paired = {} if result.scores.paired is None else vars(result.scores.paired)
    known = {name for name, value in (vars(result) | vars(result.scores) | paired).items() if value is not None}
    rows = [[text.format(r=result, s=result.scores) for text in texts] for name, *texts in _ROWS if name in known]
    show_table(("score", "value", ""), rows, text=(0, 2))


def describe_kept(config: EvaluateConfig) -> str:
    """Describes what an interrupted run leaves, and how to go on."""
    num = len([*(config.out / "units").glob("*.json")])
    return f"kept in {config.out}: {format_count(num, 'finished unit')}; run the same command to resume"
