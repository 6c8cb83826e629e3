"""The scores of `jacobiflow evaluate`, each made from units of work that processes share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

import jacobiflow as jf
from jacobiflow import data, evaluation
from jacobiflow.cli import loading
from jacobiflow.data import ImageDataset, ImageFiles, Noise
from jacobiflow.errors import InputValueError
from jacobiflow.evaluation import FeatureStatistics, PixelDifference, SampleErrors, likelihood
from jacobiflow.evaluation.distances import MIN_IMAGES
from jacobiflow.evaluation.features import FeatureFunction, require_eval_extra
from jacobiflow.models import latents
from jacobiflow.models.checkpoints.fingerprint import cached_fingerprint
from jacobiflow.models.flow import Flow
from jacobiflow.utils import files
from jacobiflow.utils.provenance import Provenance

STATISTICS = "statistics"  # The name of the score that only writes the statistics of real images.
_MAX_PAIRWISE = 10_000  # Images of either set in scores that compare all pairs.
_UNIT_IMAGES = 1_000  # Real images whose features are one unit of work.


@dataclass(frozen=True)
class Scores:
    """The scores, None for those that are not computed.

    Attributes:
        paired: Errors of samples against the exact loop's.
        stored: Difference of stored images from the exact loop's, in 8 bits.
        sensitivity: Largest change of the exact loop's samples by rounding.
        bits_per_dim: With uniform dequantisation; `bits_per_dim_noisy` has the noise of the flow's training.
    """

    frechet_distance: float | None = None
    kernel_distance: float | None = None
    kernel_distance_std: float | None = None
    precision: float | None = None
    recall: float | None = None
    paired: SampleErrors | None = None
    stored: PixelDifference | None = None
    sensitivity: float | None = None
    bits_per_dim: float | None = None
    bits_per_dim_noisy: float | None = None
    bayes_accuracy: float | None = None

    def with_scores(self, other: Scores) -> Scores:
        """Returns these scores, and those that `other` has."""
        return replace(self, **{name: value for name, value in vars(other).items() if value is not None})


@dataclass(frozen=True)
class FolderSummary:
    """The outcome of the samples in a folder, and the median and the largest of their residuals."""

    path: str
    num: int
    outcome: str
    num_fallback: int
    num_above: int
    num_nonfinite: int
    residuals: dict[str, float] | None


@dataclass(frozen=True)
class EvaluateResult(Provenance):
    """The scores, and what they are of.

    Attributes:
        against: What the distances of features compare with.
        test_images: Number of test images of the likelihoods, if they are of a test split.
        inputs: Checksum of all inputs of the scores.
        image_files: Checksums of the files of real images: of their contents, and of their names, sizes and times.
        computed: Names of the scores that are known.
        earlier: Those of them that an earlier run computed.
        num_missing: Number of units of work that other parts have not finished.
    """

    model: str
    samples: FolderSummary | None
    batch_size: int
    features: str
    against: str | None
    likelihood_images: str | None
    test_images: int | None
    inputs: str
    out: str
    part: str
    scores: Scores
    image_files: tuple[str, str]
    computed: tuple[str, ...] = ()
    earlier: tuple[str, ...] = ()
    num_missing: int = 0


@dataclass(frozen=True)
class Unit:
    """A unit of work of one process; its result is stored under the name, as JSON of the type `declared`."""

    name: str
    declared: Any
    measure: Callable[[], Any]


@dataclass(frozen=True)
class Score:
    """Scores that the results of some units give together."""

    name: str
    units: tuple[Unit, ...]
    combine: Callable[[Iterator[Any]], Scores]


Images: TypeAlias = Callable[[], Tensor]


def distances(
    flow: Flow, extractor: FeatureFunction, folder: jf.SampleFolder | None, real: ImageDataset | None,
    stats: Path | None, save_stats: Path | None,
) -> list[Score]:  # fmt: skip
    """Returns the Fréchet distance to real images; with their features, also kernel distance, precision and recall."""
    if isinstance(extractor, nn.Module):
        extractor.to(flow.var.device)
    else:
        extractor = loading.naming_errors("--features")(extractor)
    real_units = () if real is None else _feature_units("real", extractor, _real_batches(real.images, extractor))
    scores = []
    if save_stats is not None:
        inception = extractor if isinstance(extractor, evaluation.InceptionFeatures) else None
        scores.append(Score(STATISTICS, real_units, partial(_save_statistics, save_stats, inception)))
    if folder is None:
        return scores
    statistics = None if stats is None else FeatureStatistics.load(stats)
    num, num_real = folder.spec.num, len(real.images) if statistics is None and real is not None else 2
    if min(num, num_real) < 2:
        raise InputValueError(f"a distance between {num_real} images and {num} samples: give at least 2 of each")
    # A trial of the function, before hours of work.
    width = evaluation.extract_features(extractor, [folder.images(0)[:1]]).shape[1]
    if statistics is not None and len(statistics.sum) != width:
        raise InputValueError(f"--stats {stats}: of {len(statistics.sum)} features, but --features gives {width}")
    shards = [partial(folder.images, index) for index in range(folder.spec.num_shards)]
    units = _feature_units("features", extractor, shards)
    first = real_units if statistics is None else ()
    scores.append(Score("FID", (*first, *units), partial(_frechet_distance, statistics, len(first))))
    if real is not None and min(num, len(real.images)) >= MIN_IMAGES:
        require_eval_extra("the kernel distance")
        combine = partial(_pairwise, len(real_units), len(real.images), num)
        scores.append(Score("kernel distance, precision and recall", (*real_units, *units), combine))
    return scores


def _feature_units(kind: str, extractor: FeatureFunction, batches: Iterable[Images]) -> tuple[Unit, ...]:
    def extract(images: Images) -> Tensor:
        features = evaluation.extract_features(extractor, [images()])
        if not torch.isfinite(features).all():
            raise InputValueError("features that are not finite: check the images and --features")
        return features

    return tuple(Unit(f"{kind}-{i:05}", Tensor, partial(extract, images)) for i, images in enumerate(batches))


def _real_batches(images: Tensor | ImageFiles, extractor: FeatureFunction) -> list[Images]:
    """Returns functions that give real images. As in the original code of TarFlow, half of Inception's are mirrored."""
    is_mirrored = torch.zeros(len(images), dtype=torch.bool)
    if isinstance(extractor, evaluation.InceptionFeatures):
        is_mirrored = torch.rand(len(images), generator=torch.Generator().manual_seed(0)) < 0.5

    def batch(rows: Tensor) -> Tensor:
        unit = images[rows]
        return torch.where(is_mirrored[rows].view(-1, 1, 1, 1), unit.flip(-1), unit)

    return [partial(batch, rows) for rows in torch.arange(len(images)).split(_UNIT_IMAGES)]


def _statistics(features: Iterator[Tensor], num_units: int | None = None) -> FeatureStatistics:
    """Merges the statistics of the next units."""
    return FeatureStatistics.merge(map(FeatureStatistics.from_features, islice(features, num_units)))


def _save_statistics(path: Path, inception: evaluation.InceptionFeatures | None, features: Iterator[Tensor]) -> Scores:
    path.parent.mkdir(parents=True, exist_ok=True)
    _statistics(features).save(path, inception)
    return Scores()


def _frechet_distance(real: FeatureStatistics | None, num_real_units: int, features: Iterator[Tensor]) -> Scores:
    reference = _statistics(features, num_real_units) if real is None else real
    return Scores(frechet_distance=evaluation.frechet_distance(reference, _statistics(features)))


def _pairwise(num_real_units: int, num_real: int, num_fake: int, features: Iterator[Tensor]) -> Scores:
    real = _choose_rows(islice(features, num_real_units), num_real)
    fake = _choose_rows(features, num_fake)
    kernel, std = evaluation.kernel_distance(real, fake)
    precision, recall = evaluation.precision_recall(real, fake)
    return Scores(kernel_distance=kernel, kernel_distance_std=std, precision=precision, recall=recall)


def _choose_rows(parts: Iterable[Tensor], num: int) -> Tensor:
    """Joins the rows of `num` images, or `_MAX_PAIRWISE` of them at random, since they may be sorted by class."""
    is_chosen = torch.zeros(num, dtype=torch.bool)
    is_chosen[torch.randperm(num, generator=torch.Generator().manual_seed(0))[:_MAX_PAIRWISE]] = True
    rows, start = list[Tensor](), 0
    for part in parts:
        rows.append(part[is_chosen[start : start + len(part)]])
        start += len(part)
    return torch.cat(rows)


def paired_errors(folder: jf.SampleFolder, flow: Flow, num: int, batch_size: int) -> Score:
    """Returns a score that compares the first samples with the exact loop's at the same latents, batch by batch."""
    if folder.spec.context_sha256 is not None and folder.labels(0) is None:
        raise InputValueError("--paired: the samples' texts or numbers are not in the folder; give --paired 0")
    units = tuple(
        Unit(f"errors-{start:08}", Scores, partial(_batch_errors, folder, flow, start, min(start + batch_size, num)))
        for start in range(0, num, batch_size)
    )
    return Score("errors", units, _merge_errors)


def _batch_errors(folder: jf.SampleFolder, flow: Flow, start: int, stop: int) -> Scores:
    manifest, config = folder.spec, flow.config
    shards = range(start // manifest.shard_size, -(-stop // manifest.shard_size))
    rows = slice(start - shards.start * manifest.shard_size, stop - shards.start * manifest.shard_size)
    labels = [part for i in shards if (part := folder.labels(i)) is not None]
    draw = partial(
        jf.sample, flow, labels=torch.cat(labels)[rows] if labels else None,
        settings=jf.SamplingSettings(manifest.guidance, manifest.denoise),
        latents=latents.draw_latents(stop - start, config.num_tokens, config.token_channels, manifest.seed, start),
        certify=manifest.certify,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The folder's outcome tells of samples that are not finite.
        sequential = draw(strategy="sequential", sensitivity=True)
        again = draw(strategy=folder.strategy()) if manifest.has_pictures else None
    exact, sensitivity = sequential.x.cpu(), sequential.outcome.sensitivity
    if again is None:  # The folder has the samples as they were drawn, and of pictures only 8-bit values.
        read = folder.tokens if flow.image_shape is None else folder.images
        samples = torch.cat([read(i) for i in shards])[rows]
        return Scores(paired=evaluation.sample_errors(samples, exact.float()), sensitivity=sensitivity)
    stored = torch.cat([folder.images(i) for i in shards])[rows]
    return Scores(
        paired=evaluation.sample_errors(again.images.cpu(), exact),
        stored=evaluation.pixel_difference(stored, data.quantize(exact)), sensitivity=sensitivity,
    )  # fmt: skip


def _merge_errors(batches: Iterator[Scores]) -> Scores:
    parts = list(batches)
    paired = [part.paired for part in parts if part.paired is not None]
    stored = [(errors.num, part.stored) for errors, part in zip(paired, parts, strict=True) if part.stored is not None]
    return Scores(
        paired=SampleErrors.merge(paired),
        stored=PixelDifference.merge(stored) if stored else None,
        sensitivity=max((part.sensitivity for part in parts if part.sensitivity is not None), default=None),
    )


def likelihoods(flow: Flow, test: ImageDataset, seed: int, batch_size: int) -> list[Score]:
    """Returns bits per dimension and class accuracy, with the noise of the flow's training."""
    flow.check_context(test.labels, len(test))
    noise, num = Noise.of_std(flow.config.noise_std), len(test)
    batches = torch.arange(num).split(batch_size)
    name = "bits_per_dim" if noise.kind == "uniform" else "bits_per_dim_noisy"

    def score(title: str, kind: str, field: str, total: Callable[..., float]) -> Score:
        units = (
            Unit(f"{kind}-{i:05}", float, partial(total, flow, test, noise, seed, index))
            for i, index in enumerate(batches)
        )
        return Score(title, tuple(units), lambda totals: Scores(**{field: sum(totals) / num}))

    scores = [score("bits per dimension", "bits", name, likelihood.total_bits_per_dim)]
    if test.labels is not None:
        scores.append(score("class accuracy", "classes", "bayes_accuracy", likelihood.count_correct_classes))
    return scores


def digest(
    settings: tuple[Any, ...], flow: Flow, folder: jf.SampleFolder | None, images: tuple[ImageDataset | None, ...],
    paths: tuple[Path | None, ...], earlier: EvaluateResult | None,
) -> tuple[str, tuple[str, str]]:  # fmt: skip
    """Returns a checksum of all inputs of the scores: settings, weights, samples, images and files.

    Also returns those of image files, which are read only if one has changed since an earlier result.
    """
    network = (cached_fingerprint(flow), repr(flow.config), flow.precision, flow.var.device.type)
    manifest = None if folder is None else folder.path / files.MANIFEST
    parts: list[Path | bytes] = [path for path in (manifest, *paths) if path is not None and path.is_file()]
    image_files: dict[Path, None] = {}
    for each in images:
        if each is not None:
            if isinstance(each.images, ImageFiles):
                image_files |= dict.fromkeys(each.images.files)
            else:
                parts.append(each.images.numpy().tobytes())
            if each.labels is not None:
                parts.append(each.labels.numpy().tobytes())
    stats = [(str(file), files.regular_file(file).stat()) for file in image_files]
    status = files.sha256(files.json_bytes([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]))
    is_known = earlier is not None and earlier.image_files[1] == status
    contents = earlier.image_files[0] if earlier is not None and is_known else files.sha256(*image_files)
    inputs = files.sha256(files.json_bytes([jf.__version__, contents, *settings, *network]), *parts)
    return inputs, (contents, status)
