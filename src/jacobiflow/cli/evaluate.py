"""`jacobiflow evaluate`: scores of a model and its samples."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

import jacobiflow as jf
from jacobiflow.cli import loading, options, output_files
from jacobiflow.cli.output import format_count, progress_bar, show_table
from jacobiflow.errors import InputError, InputValueError

if TYPE_CHECKING:
    from jacobiflow.cli.scoring import EvaluateResult, FolderSummary, Score, Unit
    from jacobiflow.data import ImageDataset, Split
    from jacobiflow.distributed import Processes
    from jacobiflow.models.flow import Flow
    from jacobiflow.utils.store import MeasurementStore

_TABLE = "evaluation.json"
_UNITS = "units"  # The folder of the results of units, until all scores are known.
_SPLIT_NAMES = {"train": "training images", "test": "test images"}
# The rows of the table: the score that a row needs, then its label, value and remark.
_ROWS = (
    ("frechet_distance", "FID of {r.features}", "{s.frechet_distance:.4f}", "{f.num:,} samples against {r.against}"),
    ("kernel_distance", "kernel distance", "{s.kernel_distance:.5f}", "+-{s.kernel_distance_std:.5f} over subsets"),
    ("precision", "precision", "{s.precision:.3f}", ""),
    ("recall", "recall", "{s.recall:.3f}", ""),
    ("residuals", "residual", "{f.residuals[max]:.1e}", "largest; median {f.residuals[median]:.1e}"),
    ("paired", "largest error", "{s.paired.max:.1e}", "{s.paired.num:,} samples, against the exact loop"),
    ("paired", "RMS error", "{s.paired.rms:.1e}", "the same"),
    ("stored", "PSNR", "{s.paired.psnr:.1f} dB", "the same"),
    ("sensitivity", "sensitivity", "{s.sensitivity:.1e}", "largest change of the exact loop's samples by rounding"),
    ("stored", "8-bit pixels", "{s.stored.share:.3%}", "of the stored images differ, by {s.stored.levels} at most"),
    ("bits_per_dim", "bits per dimension", "{s.bits_per_dim:.3f}", "{r.likelihood_images}, uniformly dequantised"),
    ("bits_per_dim_noisy", "bits per dimension", "{s.bits_per_dim_noisy:.3f}",
     "{r.likelihood_images}, with the noise of training"),
    ("bayes_accuracy", "class accuracy", "{s.bayes_accuracy:.1%}", "by Bayes' rule; the same images"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(options.Config):
    """Options of `jacobiflow evaluate`.

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


def run(config: EvaluateConfig, processes: Processes) -> EvaluateResult | None:
    """Score a model and its samples.

    FID of the samples, their errors and residuals, and the model's likelihood of test images. The same command again
    resumes after an interruption. Several processes share the work, started by torchrun or srun.

    Example: jacobiflow evaluate --model fashion-p2 --samples out/demo --images fashion-mnist
    """
    from jacobiflow.cli import scoring

    part = jf.Part()
    result, scores = _prepare(config, processes)
    with ExitStack() as locks, progress_bar(is_shown=processes.rank == 0) as progress:
        result = processes.run_on_rank_zero(partial(_start, config, result, part, locks))
        processes.check_sees(config.out / _TABLE)
        store = _store(config.out, result.inputs)
        computed = {*result.computed}
        if config.save_stats is not None and not config.save_stats.exists():
            computed.discard(scoring.STATISTICS)
        scores = [score for score in scores if score.name not in computed]
        units = list({unit.name: unit for score in scores for unit in score.units}.values())
        results: dict[str, Any] = {}
        shared = list(enumerate(part.share(units)))
        for position, unit in processes.claim(shared):
            results[unit.name] = store.load_or_measure(unit.name, unit.declared, unit.measure)
            if progress is not None:
                progress(position + 1, len(shared), "scores")
        processes.gather(None)  # The results of all processes are on the disk.
        if processes.rank > 0:
            return None
        return _finish(config.out, result, scores, units, results)


def _prepare(config: EvaluateConfig, processes: Processes) -> tuple[EvaluateResult, list[Score]]:
    """Checks the options, loads what the scores need, and lists the scores; computes none of them."""
    from jacobiflow import evaluation
    from jacobiflow.cli import scoring
    from jacobiflow.utils import files, timing

    inputs = (config.images, config.stats, config.inception, config.samples, config.features)
    output_files.check_output("--save-stats", config.save_stats, *inputs)
    files.check_own(config.out, "evaluation")
    features = _check_options(config)
    device = processes.device(loading.pick_device(config.device))
    flow = loading.load_model(config.model, device, config.dtype)
    folder = None if config.samples is None else _open_samples(config.samples, flow, processes)
    scores, real, test = list[scoring.Score](), None, None
    likelihood_images = against = test_images = None
    if folder is not None and config.paired:
        num = min(config.paired, folder.spec.num)
        scores.append(scoring.paired_errors(folder, flow, num, config.batch_size))
    if config.images is not None and config.test_images:
        test, kind = _load_images(config.images, flow, "test", config.test_images)
        likelihood_images = f"{len(test):,} {kind} of {config.images}"
        test_images = len(test) if kind == _SPLIT_NAMES["test"] else None
        scores += scoring.likelihoods(flow, test, config.seed, config.batch_size)
    if features != "none" and (folder is not None or config.save_stats is not None):
        flow.require_images()
        if config.images is not None:
            real, kind = _load_images(config.images, flow, "train")
            against = f"{kind} of {config.images}"
        against = against if config.stats is None else str(config.stats)
        extractor = evaluation.load_features(features, config.inception)
        scores += scoring.distances(flow, extractor, folder, real, config.stats, config.save_stats)
    settings = (features, config.paired, config.seed, config.batch_size)
    paths = (Path(features.rpartition(":")[0]), config.inception, config.stats)
    digest = partial(scoring.digest, settings, flow, folder, (real, test), paths, _load(config.out / _TABLE))
    checksum, image_files = processes.run_on_rank_zero(digest)
    result = scoring.EvaluateResult(
        model=config.model, samples=None if folder is None else processes.run_on_rank_zero(partial(_describe, folder)),
        batch_size=config.batch_size, features=features, against=against, likelihood_images=likelihood_images,
        test_images=test_images, out=str(config.out), part=str(jf.Part()), scores=scoring.Scores(),
        inputs=checksum, image_files=image_files, machine=timing.describe_machine(flow.var.device),
    )  # fmt: skip
    return result, scores


def _check_options(config: EvaluateConfig) -> str:
    """Raises ValueError for options that lack others; returns `--features` or its default."""
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
    return features


def _open_samples(path: Path, flow: Flow, processes: Processes) -> jf.SampleFolder:
    """Opens a folder of samples; raises ValueError if it is incomplete, or of another flow."""
    from jacobiflow.models.checkpoints.fingerprint import check_fingerprint

    folder = jf.SampleFolder.open(path)
    check_fingerprint(folder.spec.weights_sha256, flow, f"--samples {path}: drawn from", "give that one as --model")
    for problem in processes.run_on_rank_zero(folder.problems):
        raise InputValueError(problem)
    return folder


def _describe(folder: jf.SampleFolder) -> FolderSummary:
    from jacobiflow.cli import scoring

    outcome, residual = folder.outcome(), folder.residual()
    residuals = None if residual is None else {"median": float(residual.median()), "max": float(residual.max())}
    return scoring.FolderSummary(
        str(folder.path), outcome.num, str(outcome), outcome.num_fallback, outcome.num_above, outcome.num_nonfinite,
        residuals,
    )  # fmt: skip


def _load_images(source: str, flow: Flow, split: Split, num: int | None = None) -> tuple[ImageDataset, str]:
    """Loads a split, or a source without splits, or `num` evenly spaced images; also returns the name of the split."""
    import torch

    from jacobiflow import data

    splits = data.available_splits(source)
    split = split if split in splits else "train"
    name = _SPLIT_NAMES[split] if split in splits else "images"
    images = data.load_images(source, *loading.image_size(flow), split)
    if not flow.config.num_classes:
        images = replace(images, labels=None)
    if num is not None and num < len(images):
        indices = torch.arange(num) * len(images) // num  # The first ones of a folder would be of one class.
        labels = None if images.labels is None else images.labels[indices]
        images = replace(images, images=images.images[indices], labels=labels)
    return images, name


def _store(out: Path, inputs: str) -> MeasurementStore:
    from jacobiflow.utils.store import MeasurementStore

    return MeasurementStore(out / _UNITS, inputs)


def _start(config: EvaluateConfig, result: EvaluateResult, part: jf.Part, locks: ExitStack) -> EvaluateResult:
    """Locks the part, and returns the result with the scores of an earlier run of the same inputs."""
    from jacobiflow.distributed.parts import start_part
    from jacobiflow.utils import files

    out = config.out
    files.check_own(out, "evaluation")
    with start_part(out, part, locks) as has_others:
        earlier, has_scores = _load(out / _TABLE), (out / _UNITS).exists()
        has_scores |= (out / _TABLE).exists() and (earlier is None or bool(earlier.computed))
        if earlier is not None and earlier.inputs == result.inputs and not config.overwrite:
            result = replace(result, scores=earlier.scores, computed=earlier.computed, earlier=earlier.computed)
        elif has_others or (has_scores and not config.overwrite):
            raise InputValueError(f"{out}: holds scores of other inputs; give another folder, or --overwrite")
        else:
            _store(out, "").remove()
        files.write_manifest(out, "evaluation", (_TABLE,))
        files.write_json(out / _TABLE, asdict(result))
    return result


def _load(table: Path) -> EvaluateResult | None:
    """Returns the result of an earlier run, if any."""
    from jacobiflow.cli.scoring import EvaluateResult
    from jacobiflow.utils import files, serialization

    with suppress(InputError):  # It is of another version.
        return serialization.decode(EvaluateResult, files.read_object(table))
    return None


def _finish(
    out: Path, result: EvaluateResult, scores: list[Score], units: list[Unit], results: dict[str, Any]
) -> EvaluateResult:
    """Computes the scores, and writes the result after each of them, unless units of other parts are missing."""
    from jacobiflow.distributed.parts import forget_parts, lock_folder
    from jacobiflow.utils import files

    store = _store(out, result.inputs)

    def load(score: Score) -> Iterator[Any]:
        for unit in score.units:
            is_own = unit.name in results
            yield results[unit.name] if is_own else store.load_or_measure(unit.name, unit.declared, unit.measure)

    with lock_folder(out):
        missing = [unit for unit in units if unit.name not in results and not store.has(unit.name)]
        if missing:
            return replace(result, num_missing=len(missing))
        for score in scores:
            new = result.scores.with_scores(score.combine(load(score)))
            result = replace(result, scores=new, computed=tuple(dict.fromkeys((*result.computed, score.name))))
            files.write_json(out / _TABLE, asdict(result))
        store.remove()
        forget_parts(out)
    return result


def show(result: EvaluateResult) -> None:
    """Prints the scores as a table."""
    if result.earlier:
        print(f"computed by an earlier run: {', '.join(result.earlier)}")
    if result.num_missing:
        print(
            f"part {result.part} is done; the scores follow once other parts have done {result.num_missing} more units"
        )
        return
    samples = result.samples
    if samples is not None:
        print(samples.outcome)
        if samples.num_nonfinite:
            print("samples that overflowed are stored as black images, which count in the scores")
    known = {entry.name for entry in fields(result.scores) if getattr(result.scores, entry.name) is not None}
    if samples is not None and samples.residuals is not None:
        known.add("residuals")
    rows = [
        [text.format(r=result, s=result.scores, f=samples) for text in texts] for name, *texts in _ROWS if name in known
    ]
    show_table(("score", "value", ""), rows, text=(0, 2))
    print(f"wrote {Path(result.out) / _TABLE}")


def describe_kept(config: EvaluateConfig) -> str:
    """Describes the scores that Ctrl-C leaves, and how to go on."""
    num = len([*(config.out / _UNITS).glob("*.json")])
    if not num:
        return "nothing is computed yet; run the same command to start again"
    return f"{format_count(num, 'finished part')} are kept in {config.out}; run the same command to resume"
