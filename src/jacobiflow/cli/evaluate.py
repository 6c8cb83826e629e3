"""`jacobiflow evaluate`: scores of a model and its samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from jacobiflow.cli import loading, options
from jacobiflow.cli.output import run_job, show_table
from jacobiflow.errors import InputValueError

if TYPE_CHECKING:
    from jacobiflow.evaluation.job import EvaluationResult

# The rows of the table: the score that a row needs, then its label, value and remark.
_ROWS = (
    ("frechet_distance", "FID of {r.features}", "{s.frechet_distance:.4f}",
     "{r.samples.num:,} samples against {r.against}"),
    ("kernel_distance", "kernel distance", "{s.kernel_distance:.5f}", "+-{s.kernel_distance_std:.5f} over subsets"),
    ("precision", "precision", "{s.precision:.3f}", ""),
    ("recall", "recall", "{s.recall:.3f}", ""),
    ("bits_per_dim", "bits per dimension", "{s.bits_per_dim:.3f}",
     "{r.test_images:,} {r.likelihood_images}, uniformly dequantised"),
    ("bits_per_dim_noisy", "bits per dimension", "{s.bits_per_dim_noisy:.3f}",
     "{r.test_images:,} {r.likelihood_images}, with the noise of training"),
    ("bayes_accuracy", "class accuracy", "{s.bayes_accuracy:.1%}", "by Bayes' rule; the same images"),
    ("median_residual", "residual", "{r.samples.residual:.1e}", "largest; median {r.median_residual:.1e}"),
    ("identical", "largest error", "0", "{s.paired.num:,} samples, identical to those of the exact loop"),
    ("paired", "largest error", "{s.paired.max:.1e}", "{s.paired.num:,} samples, against the exact loop"),
    ("paired", "RMS error", "{s.paired.rms:.1e}", "the same"),
    ("psnr", "PSNR", "{s.paired.psnr:.1f} dB", "the same"),
    ("sensitivity", "sensitivity", "{s.sensitivity:.1e}", "largest change of the exact loop's samples by rounding"),
    ("pixels", "8-bit pixels", "{s.paired.pixels.share:.3%}",
     "of the stored images differ, by {s.paired.pixels.levels} at most"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(options.Config):
    """Score a model and its samples.

    Computes the samples' FID, errors and residuals, and the model's likelihood of test images. Rerun the same command
    to resume after an interruption. Several processes that run it share the work.

    Example: jacobiflow evaluate --model fashion-p2 --samples out/demo --images fashion-mnist

    Attributes:
        samples: A folder that jacobiflow sample wrote.
        features: inception (FID), or FILE.py:FUNCTION for a function from 8-bit images (N, C, H, W) to features (N, d);
            or none. Default: inception, if there are real images.
        inception: File of Inception's weights. Default: it is downloaded.
        stats: Statistics to compare with, such as *_fid_stats.pth.
        save_stats: Write the statistics of --images to this file.
        paired: Number of samples to compare with those of the exact loop, in the batches in which they were drawn.
            Default: 64; 0 if they had prompts, which the folder lacks.
        test_images: Number of images whose likelihood is measured, evenly spaced in the test split if there is one.
        overwrite: Replace the scores in the folder, or another job.
        out: Folder for evaluation.json.
    """

    model: options.Model
    samples: Annotated[Path | None, options.MODEL, options.EXISTING] = None
    images: Annotated[str | None, options.IMAGES, Parameter(help=f"Real images to compare with: {options.SOURCES}")] = (
        None
    )
    features: Annotated[str | None, options.MEASUREMENT] = None
    inception: Annotated[Path | None, options.MEASUREMENT, options.EXISTING] = None
    stats: Annotated[Path | None, options.MEASUREMENT, options.EXISTING] = None
    save_stats: Annotated[Path | None, options.OUTPUT] = None
    paired: Annotated[int | None, options.MEASUREMENT, options.within(0)] = None
    test_images: Annotated[int, options.MEASUREMENT, options.within(0)] = 1000
    batch_size: options.NetworkBatchSize = 64
    seed: options.Seed = 0
    device: options.Device = "auto"
    dtype: options.Dtype = "float32"
    overwrite: Annotated[options.Flag, options.OUTPUT] = False
    out: Annotated[Path, options.OUTPUT] = Path("out/evaluation")
    folder_kind = "evaluation"

    def choose_features(self) -> str:
        """Returns the name of the features, by default those of Inception if there is something to compare."""
        has_real = self.images is not None or self.stats is not None
        has_fake = self.samples is not None or self.save_stats is not None
        return self.features or ("inception" if has_real and has_fake else "none")

    def check_options(self) -> None:
        """Also refuses options that lack others."""
        super().check_options()
        features = self.choose_features()
        if self.samples is None and self.images is None:
            raise InputValueError(
                "nothing to evaluate: give --images or --samples (a folder that jacobiflow sample wrote)"
            )
        if self.samples is None and self.save_stats is None and (self.stats is not None or features != "none"):
            raise InputValueError(f"--features {features}: give --samples, too, or leave --features and --stats out")
        if self.images is None and self.stats is None and features != "none":
            raise InputValueError(f"--features {features}: give --images or --stats, to compare with")
        if self.save_stats is not None and (self.images is None or features == "none"):
            raise InputValueError(f"--save-stats {self.save_stats}: give --images and --features to compute them from")
        self.check_file("save_stats")
        if self.samples is not None and self.samples.resolve() == self.out.resolve():
            raise InputValueError(f"--out {self.out}: is the folder of --samples; give another folder")


def run(config: EvaluateConfig) -> EvaluationResult | None:
    """Computes the scores that are not in the folder yet."""
    from jacobiflow.evaluation.job import EvaluationJob, EvaluationResult
    from jacobiflow.utils import serialization

    flow = loading.load_model(config.model, config.device, config.dtype)
    job = EvaluationJob(
        flow, config.model, samples=config.samples, images=config.images, features=config.choose_features(),
        inception=config.inception, statistics=config.stats, paired=config.paired, test_images=config.test_images,
        batch_size=config.batch_size, seed=config.seed,
    )  # fmt: skip
    completed = run_job(job, config.out, config.overwrite)
    if completed is None:
        return None
    if config.save_stats is not None:
        job.save_statistics(job.store(config.out), config.save_stats)
    return serialization.decode(EvaluationResult, completed.result)


def show(config: EvaluateConfig, result: EvaluationResult) -> None:
    """Prints the scores as a table."""
    if result.samples is not None:
        print(result.samples)
        if result.samples.num_nonfinite:
            print("samples that overflowed are stored as black images, which count in the scores")
    paired = result.scores.paired
    values = vars(result) | vars(result.scores) | ({} if paired is None else vars(paired))
    names = {name for name, value in values.items() if value is not None}
    if paired is not None and paired.max == 0:
        names = names - {"paired", "psnr"} | {"identical"}
    elif "pixels" not in names:  # A PSNR is of pictures.
        names.discard("psnr")
    rows = [[text.format(r=result, s=result.scores) for text in texts] for name, *texts in _ROWS if name in names]
    show_table(("score", "value", ""), rows, text=(0, 2))


def describe_kept(config: EvaluateConfig) -> str:
    """Describes what an interrupted run leaves, and how to go on."""
    return f"finished units are kept in {config.out}; run the same command to resume"
