"""The scores of a flow and its samples, as a job that any number of processes share."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from jacobiflow.blocks.guidance import SamplingSettings
from jacobiflow.data import ImageDataset, Noise, Split, available_splits, load_images, quantize
from jacobiflow.errors import InputValueError
from jacobiflow.evaluation.differences import SampleErrors, pixel_difference, sample_errors
from jacobiflow.evaluation.distances import (
    MIN_IMAGES,
    FeatureStatistics,
    check_comparable,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from jacobiflow.evaluation.features import (
    FeatureFunction,
    InceptionFeatures,
    extract_features,
    load_features,
    require_eval_extra,
)
from jacobiflow.evaluation.likelihood import count_correct_classes, total_bits_per_dim
from jacobiflow.jobs import Job, JobStore, Unit, UnitOutput
from jacobiflow.models.checkpoints.fingerprint import check_fingerprint, fingerprint, weights_sha256
from jacobiflow.models.flow import Flow
from jacobiflow.models.latents import draw_latents
from jacobiflow.sampling.folder import SampleFolder
from jacobiflow.sampling.result import Outcome
from jacobiflow.sampling.sample import sample
from jacobiflow.utils import serialization
from jacobiflow.utils.files import sha256
from jacobiflow.utils.provenance import Provenance
from jacobiflow.utils.timing import describe_machine

_PAIRED = 64  # Samples that are compared with the exact loop's, by default.
_MAX_PAIRWISE = 10_000  # Images of either set in scores that compare all pairs.
_UNIT_IMAGES = 1_000  # Real images whose features are one unit.


@dataclass(frozen=True)
class EvaluationSpec:
    """All that the scores depend on.

    Attributes:
        model: Name of the flow.
        flow_sha256: Fingerprint of the flow.
        dtype: The dtype of the network, or "tf32".
        batch_size: Test images in the network at a time.
        seed: Seed of the noise on test images.
        samples_sha256: Checksum of the samples; None without samples.
        paired: Number of samples that are compared with the exact loop's.
        features: Name of the features of images; "none" if none are compared.
        features_sha256: Checksum of the files of features and statistics.
        against: Name of the images or statistics that the samples are compared with.
        test_images: Number of images whose likelihood is measured.
        likelihood_images: Name of these images.
        images_sha256: Checksum of all images.
        weights_sha256: Checksum of the exact weights of the flow; None in results of format 1.
    """

    model: str
    flow_sha256: str
    dtype: str
    batch_size: int
    seed: int
    samples_sha256: str | None
    paired: int
    features: str
    features_sha256: str
    against: str | None
    test_images: int
    likelihood_images: str | None
    images_sha256: str
    weights_sha256: str | None = None


@dataclass(frozen=True)
class Scores:
    """The scores, None for those that are not computed.

    Attributes:
        paired: Errors of samples against the exact loop's; `pixels` is that of the stored images.
        sensitivity: Largest change of the exact loop's samples by rounding.
        bits_per_dim: With uniform dequantisation; `bits_per_dim_noisy` has the noise of the flow's training.
    """

    frechet_distance: float | None = None
    kernel_distance: float | None = None
    kernel_distance_std: float | None = None
    precision: float | None = None
    recall: float | None = None
    paired: SampleErrors | None = None
    sensitivity: float | None = None
    bits_per_dim: float | None = None
    bits_per_dim_noisy: float | None = None
    bayes_accuracy: float | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationResult(Provenance, EvaluationSpec):
    """The scores, and all that they depend on.

    Attributes:
        samples: Outcome of the samples; None without samples.
        median_residual: Median of the residuals of the samples; None if they were not measured.
    """

    samples: Outcome | None
    median_residual: float | None
    scores: Scores


class EvaluationJob(Job):
    """The job of `jacobiflow evaluate`; its arguments are the options of this command, and the flow that they name.

    Raises:
        InputValueError: If a score cannot be computed; the features are tried on one image.
    """

    kind, version, oldest, result_name = "evaluation", 2, 1, "evaluation.json"

    def __init__(
        self, flow: Flow, model: str, *, samples: Path | None, images: str | None, features: str,
        inception: Path | None, statistics: Path | None, paired: int | None, test_images: int, batch_size: int,
        seed: int,
    ) -> None:  # fmt: skip
        self.flow, self.machine = flow, describe_machine(flow.var.device)
        self.folder = folder = None if samples is None else _open_samples(samples, flow)
        paired = 0 if folder is None else _check_paired(paired, folder, flow)
        self.features: FeatureFunction | None = None
        self.statistics: FeatureStatistics | None = None
        self._units = defaultdict[str, list[Unit]](list)  # By kind.
        against = likelihood_images = test = real = None
        num = 0 if folder is None else folder.spec.num
        if folder is not None:
            self._split("errors", min(paired, num), folder.spec.batch_size, partial(_measure_errors, flow, folder))
        if images is not None and test_images:
            test, likelihood_images = _load_split(images, flow, "test")
            test = test.evenly_spaced(min(test_images, len(test)))  # The first ones may be of one class.
            flow.context_kind.resolve(test.labels, len(test))
            self._split("likelihoods", len(test), batch_size, partial(_measure_likelihoods, flow, test, seed))
        if features != "none":
            flow.require_images()
            self.features = load_features(features, inception)
            if isinstance(self.features, nn.Module):
                self.features.to(flow.var.device)
            if images is not None:
                real, against = _load_split(images, flow, "train")
                extract = partial(_extract, "real", self.features, partial(_real_images, real, self.features))
                self._split("real", len(real), _UNIT_IMAGES, extract)
            if statistics is not None:
                self.statistics, against = FeatureStatistics.load(statistics), str(statistics)
            if folder is not None:
                _check_features(self.features, folder, real, self.statistics)
                size = folder.spec.shard_size
                extract = partial(_extract, "samples", self.features, lambda rows: folder.images(rows.start // size))
                self._split("samples", num, size, extract)
        files = [Path(features.rpartition(":")[0]), *filter(None, (inception, statistics))]
        image_checksums = "".join(each.sha256() for each in (real, test) if each is not None)
        self.spec = EvaluationSpec(
            model=model, flow_sha256=fingerprint(flow), weights_sha256=weights_sha256(flow), dtype=flow.precision,
            batch_size=batch_size, seed=seed, samples_sha256=None if folder is None else folder.sha256(),
            paired=min(paired, num), features=features,
            features_sha256=sha256(features.rpartition(":")[2].encode(), *filter(Path.is_file, files)),
            against=against, test_images=len(test or ()), likelihood_images=likelihood_images,
            images_sha256=sha256(image_checksums.encode()),
        )  # fmt: skip

    def _split(self, kind: str, num: int, size: int, run: Callable[[range], UnitOutput]) -> None:
        """Adds the units of `num` images, of which one unit has at most `size`; their names have the range."""

        def unit(start: int) -> Unit:
            rows = range(num)[start : start + size]
            return Unit(f"{kind}-{rows.start}-{rows.stop}", lambda _: run(rows))

        self._units[kind] = [unit(start) for start in range(0, num, size)]

    def resume(self, earlier: Mapping[str, Any]) -> EvaluationJob:
        """Returns this job with the names in the earlier spec: checksums tell what they stand for."""
        names = ("model", "features", "against", "likelihood_images")
        job = copy(self)
        job.spec = replace(self.spec, **{name: earlier[name] for name in names})
        return job

    def stages(self, store: JobStore) -> Iterator[list[Unit]]:
        """Yields all units."""
        yield [unit for units in self._units.values() for unit in units]

    def reduce(self, store: JobStore) -> Any:
        """Returns an `EvaluationResult` as a JSON value."""
        folder, scores = self.folder, self._measure_distances(store)
        if errors := [store.value(unit.name) for unit in self._units["errors"]]:
            paired, sensitivity = zip(*errors, strict=True)
            scores["paired"] = SampleErrors.merge([serialization.decode(SampleErrors, each) for each in paired])
            scores["sensitivity"] = max((each for each in sensitivity if each is not None), default=None)
        if likelihoods := [store.value(unit.name) for unit in self._units["likelihoods"]]:
            bits, num_correct = zip(*likelihoods, strict=True)
            name = "bits_per_dim_noisy" if self.flow.config.noise_std else "bits_per_dim"
            scores[name] = sum(bits) / self.spec.test_images
            scores["bayes_accuracy"] = None if None in num_correct else sum(num_correct) / self.spec.test_images
        residual = None if folder is None else folder.residual()
        result = EvaluationResult(
            **vars(self.spec), machine=dict(self.machine), samples=None if folder is None else folder.outcome(),
            median_residual=None if residual is None else float(residual.median()), scores=Scores(**scores),
        )  # fmt: skip
        return serialization.encode(result)

    def _measure_distances(self, store: JobStore) -> dict[str, Any]:
        """Returns the Fréchet distance, and with features of real images kernel distance, precision and recall."""
        if not self._units["samples"]:
            return {}
        real = self.statistics or self._merge_statistics(store, "real")
        scores = {"frechet_distance": frechet_distance(real, self._merge_statistics(store, "samples"))}
        if self._units["real"]:
            sets = self._choose_features(store, "real"), self._choose_features(store, "samples")
            if min(map(len, sets)) >= MIN_IMAGES:
                scores["kernel_distance"], scores["kernel_distance_std"] = kernel_distance(*sets)
                scores["precision"], scores["recall"] = precision_recall(*sets)
        return scores

    def save_statistics(self, store: JobStore, path: Path) -> None:
        """Writes the statistics of the real images to a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        inception = self.features if isinstance(self.features, InceptionFeatures) else None
        self._merge_statistics(store, "real").save(path, inception)

    def _merge_statistics(self, store: JobStore, kind: str) -> FeatureStatistics:
        return FeatureStatistics.merge(map(FeatureStatistics.from_features, self._load_features(store, kind)))

    def _choose_features(self, store: JobStore, kind: str) -> Tensor:
        """Returns all features, or `_MAX_PAIRWISE` of them at random, since images may be sorted by class."""
        features = torch.cat(list(self._load_features(store, kind)))
        rows = torch.randperm(len(features), generator=torch.Generator().manual_seed(0), device="cpu")[:_MAX_PAIRWISE]
        return features[rows.sort().values]

    def _load_features(self, store: JobStore, kind: str) -> Iterator[Tensor]:
        for unit in self._units[kind]:
            for file in store.checksums(unit.name):
                yield safetensors.torch.load_file(store.path / file)["features"]


def _measure_errors(flow: Flow, folder: SampleFolder, rows: range) -> UnitOutput:
    """Compares samples with the exact loop's of the same latents; also returns the latters' largest sensitivity."""
    spec, config = folder.spec, flow.config
    shard, first = divmod(rows.start, spec.shard_size)  # A batch is in one shard.
    part = slice(first, first + len(rows))
    labels = folder.labels(shard)
    draw = partial(
        sample, flow, labels=None if labels is None else labels[part],
        latents=draw_latents(len(rows), config.num_tokens, config.token_dim, spec.seed, rows.start),
        settings=SamplingSettings(spec.guidance, spec.denoise, spec.denoise_dtype), certify=spec.certify,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The folder's outcome tells of samples that are not finite.
        loop = draw(strategy="sequential", sensitivity=True)
        if spec.has_pictures:  # The folder has only their 8-bit values, and other samples as they were drawn.
            samples = draw(strategy=folder.strategy()).x.cpu()
        else:
            samples = (folder.tokens if flow.image_shape is None else folder.images)(shard)[part]
    exact = loop.x.cpu().float()
    pixels = pixel_difference(folder.images(shard)[part], quantize(exact)) if spec.has_pictures else None
    errors = replace(sample_errors(samples, exact), pixels=pixels)
    return UnitOutput(value=serialization.encode((errors, loop.outcome.sensitivity)))


def _measure_likelihoods(flow: Flow, test: ImageDataset, seed: int, rows: range) -> UnitOutput:
    """Measures the sum of the bits per dimension of images, and the number of them whose class the flow finds."""
    batch = flow, test, Noise(flow.config.noise_std), seed, torch.tensor(rows, device="cpu")
    num_correct = None if test.labels is None else count_correct_classes(*batch)
    return UnitOutput(value=(total_bits_per_dim(*batch), num_correct))


def _real_images(real: ImageDataset, features: FeatureFunction, rows: range) -> Tensor:
    """Returns real images; as in the original code of TarFlow, half of Inception's are mirrored."""
    images = real.images[torch.tensor(rows, device="cpu")]
    if not isinstance(features, InceptionFeatures):
        return images
    is_mirrored = torch.rand(len(real), generator=torch.Generator().manual_seed(0), device="cpu") < 0.5
    return torch.where(is_mirrored[rows.start : rows.stop].view(-1, 1, 1, 1), images.flip(-1), images)


def _extract(kind: str, features: FeatureFunction, images: Callable[[range], Tensor], rows: range) -> UnitOutput:
    """Computes features of real images or samples, as a file."""
    file = f"features/{kind}-{rows.start}-{rows.stop}.safetensors"
    return UnitOutput({file: safetensors.torch.save({"features": extract_features(features, images(rows))})})


def _check_features(
    features: FeatureFunction, folder: SampleFolder, real: ImageDataset | None, statistics: FeatureStatistics | None
) -> None:
    """Raises InputValueError if the features of the samples cannot be compared with those of the real images."""
    num, width = folder.spec.num, extract_features(features, folder.images(0)[:1]).shape[1]
    if statistics is not None:
        check_comparable((statistics.num, len(statistics.sum)), (num, width))
    if real is not None:
        check_comparable((len(real), width), (num, width))
        require_eval_extra("the kernel distance")


def _open_samples(path: Path, flow: Flow) -> SampleFolder:
    """Opens a folder of samples; raises InputValueError if it is incomplete, or of another flow."""
    folder = SampleFolder.open(path)
    check_fingerprint(folder.spec.flow_sha256, flow, f"--samples {path}: drawn from", "give that one as --model")
    for problem in folder.problems():
        raise InputValueError(problem)
    return folder


def _check_paired(paired: int | None, folder: SampleFolder, flow: Flow) -> int:
    """Returns the number of samples that are drawn again; raises InputValueError if they cannot be."""
    if folder.spec.labels_or_context_sha256 is not None and folder.labels(0) is None:
        message = "the samples' texts or numbers are not in the folder"
        if paired:
            raise InputValueError(f"{message}; give 0", argument="paired", value=paired)
        if paired is None:
            warnings.warn(f"no comparison with the exact loop: {message}", stacklevel=2)
        return 0
    paired = _PAIRED if paired is None else paired
    of_samples, of_flow = (dtype.replace("tf32", "float32") for dtype in (folder.spec.dtype, flow.precision))
    if paired and folder.spec.has_pictures and of_samples != of_flow:  # Pictures are drawn again.
        message = f"drawn in {of_samples}, not {of_flow}; give --dtype {of_samples}, or 0"
        raise InputValueError(message, argument="paired", value=paired)
    return paired


def _load_split(source: str, flow: Flow, split: Split) -> tuple[ImageDataset, str]:
    """Loads a split of images, or all if the source has no such split; also returns the name of the images."""
    splits = available_splits(source)
    names: dict[Split, str] = {"train": "training images", "test": "test images"}
    split = split if split in splits else "train"
    channels, size, _ = flow.require_images()
    data = load_images(source, size, channels, split)
    name = f"{names[split] if splits else 'images'} of {source}"
    return data if flow.config.num_classes else replace(data, labels=None), name
