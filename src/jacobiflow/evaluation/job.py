"""The scores of a flow and its samples, as a job that any number of processes share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from jacobiflow.blocks.guidance import SamplingSettings
from jacobiflow.data import ImageDataset, Noise, quantize
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
from jacobiflow.evaluation.features import FeatureFunction, InceptionFeatures, extract_features, require_eval_extra
from jacobiflow.evaluation.likelihood import count_correct_classes, total_bits_per_dim
from jacobiflow.jobs import Job, JobStore, UnitOutput
from jacobiflow.models.flow import Flow
from jacobiflow.models.latents import draw_latents
from jacobiflow.sampling.folder import SampleFolder
from jacobiflow.sampling.result import Outcome
from jacobiflow.sampling.sample import sample
from jacobiflow.utils import serialization
from jacobiflow.utils.progress import Progress
from jacobiflow.utils.provenance import Provenance
from jacobiflow.utils.timing import describe_machine

_MAX_PAIRWISE = 10_000  # Images of either set in scores that compare all pairs.
_UNIT_IMAGES = 1_000  # Real images whose features are one unit.


@dataclass(frozen=True)
class EvaluationSpec:
    """All that the scores depend on.

    Attributes:
        model: Name of the flow.
        weights_sha256: Checksum of its weights and config.
        dtype: The dtype of the network, or "tf32".
        batch_size: Images in the network at a time.
        seed: Seed of the noise on test images.
        samples_sha256: Checksum of the samples; None without samples.
        paired: Number of samples that are compared with the exact loop's.
        features: Name of the features of images; "none" if none are compared.
        features_sha256: Checksum of the files of features and statistics.
        against: Name of the images or statistics that the samples are compared with.
        test_images: Number of images whose likelihood is measured.
        likelihood_images: Name of these images.
        images_sha256: Checksum of all images.
    """

    model: str
    weights_sha256: str
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


@dataclass(frozen=True)
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
    """Scores a flow and its samples. A unit is the errors, likelihoods or features of some images.

    Args:
        spec: All that the scores depend on.
        samples: Samples of the flow.
        real: Real images, whose features are compared with those of the samples.
        test: Images whose likelihood is measured, and class accuracy if they have labels.
        features: Gives features of images; a module is on the device of the flow.
        statistics: Statistics of real images, which the Fréchet distance takes in place of those of `real`.

    Raises:
        InputValueError: If a score cannot be computed; the features are tried on one image.
    """

    kind, result_name, patterns = "evaluation", "evaluation.json", ("features/*.safetensors",)

    def __init__(
        self, spec: EvaluationSpec, flow: Flow, samples: SampleFolder | None, real: ImageDataset | None,
        test: ImageDataset | None, features: FeatureFunction | None, statistics: FeatureStatistics | None,
    ) -> None:  # fmt: skip
        self.spec, self.flow, self.machine = spec, flow, describe_machine(flow.var.device)
        self.samples, self.features, self.statistics = samples, features, statistics
        self.units: dict[str, list[Callable[[], Any]]] = {"errors": [], "likelihoods": [], "real": [], "samples": []}
        if samples is not None and spec.paired:
            if samples.spec.labels_or_context_sha256 is not None and samples.labels(0) is None:
                message = "the samples' texts or numbers are not in the folder; give 0"
                raise InputValueError(message, argument="paired", value=spec.paired)
            rows = [range(spec.paired)[i : i + spec.batch_size] for i in range(0, spec.paired, spec.batch_size)]
            self.units["errors"] = [partial(_measure_errors, flow, samples, each) for each in rows]
        if test is not None:
            batches = torch.arange(len(test)).split(spec.batch_size)
            self.units["likelihoods"] = [partial(_measure_likelihoods, flow, test, spec.seed, each) for each in batches]
        if real is not None and features is not None:
            batches = torch.arange(len(real)).split(_UNIT_IMAGES)
            self.units["real"] = [
                partial(_extract, features, partial(_real_images, features, real, each)) for each in batches
            ]
        if samples is not None and features is not None:
            shards = range(samples.spec.num_shards)
            self.units["samples"] = [partial(_extract, features, partial(samples.images, i)) for i in shards]
            num, width = samples.spec.num, extract_features(features, [samples.images(0)[:1]]).shape[1]
            if statistics is not None:
                check_comparable((statistics.num, len(statistics.sum)), (num, width))
            if real is not None:
                check_comparable((len(real), width), (num, width))
                require_eval_extra("the kernel distance")

    def stages(self, store: JobStore) -> Iterator[Mapping[str, int]]:
        """Yields all units."""
        yield {unit: 1 for kind in self.units for unit in self._names(kind)}

    def _names(self, kind: str) -> list[str]:
        return [f"{kind}-{i:05}" for i in range(len(self.units[kind]))]

    def compute(self, unit: str, store: JobStore, progress: Progress | None) -> UnitOutput:
        """Computes features, or the errors or likelihoods of a batch."""
        kind, _, index = unit.partition("-")
        output = self.units[kind][int(index)]()
        if isinstance(output, Tensor):
            return UnitOutput({_file(unit): safetensors.torch.save({"features": output})})
        return UnitOutput(value=serialization.encode(output))

    def reduce(self, store: JobStore) -> Any:
        """Returns an `EvaluationResult` as a JSON value."""
        samples, scores = self.samples, self._measure_distances(store)
        if errors := [store.value(unit) for unit in self._names("errors")]:
            paired, sensitivity = zip(*errors, strict=True)
            scores["paired"] = SampleErrors.merge([serialization.decode(SampleErrors, each) for each in paired])
            scores["sensitivity"] = max((each for each in sensitivity if each is not None), default=None)
        if likelihoods := [store.value(unit) for unit in self._names("likelihoods")]:
            bits, num_correct = zip(*likelihoods, strict=True)
            name = "bits_per_dim_noisy" if self.flow.config.noise_std else "bits_per_dim"
            scores[name] = sum(bits) / self.spec.test_images
            scores["bayes_accuracy"] = None if None in num_correct else sum(num_correct) / self.spec.test_images
        residual = None if samples is None else samples.residual()
        result = EvaluationResult(
            **vars(self.spec), machine=dict(self.machine), samples=None if samples is None else samples.outcome(),
            median_residual=None if residual is None else float(residual.median()), scores=Scores(**scores),
        )  # fmt: skip
        return serialization.encode(result)

    def _measure_distances(self, store: JobStore) -> dict[str, Any]:
        """Returns the Fréchet distance, and with features of real images kernel distance, precision and recall."""
        if not self.units["samples"]:
            return {}
        real = self.statistics or self._merge_statistics(store, "real")
        scores = {"frechet_distance": frechet_distance(real, self._merge_statistics(store, "samples"))}
        if self.units["real"]:
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
        rows = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:_MAX_PAIRWISE]
        return features[rows.sort().values]

    def _load_features(self, store: JobStore, kind: str) -> Iterator[Tensor]:
        for unit in self._names(kind):
            yield safetensors.torch.load_file(store.path / _file(unit))["features"]


def _file(unit: str) -> str:
    return f"features/{unit}.safetensors"


def _measure_errors(flow: Flow, folder: SampleFolder, rows: range) -> tuple[SampleErrors, float | None]:
    """Compares samples with the exact loop's at the same latents; also returns the largest sensitivity."""
    config, spec, size = flow.config, folder.spec, folder.spec.shard_size
    first = rows.start // size

    def read(load: Callable[[int], Any]) -> Any:
        shards = torch.cat([load(i) for i in range(first, -(-rows.stop // size))])
        return shards[rows.start - first * size : rows.stop - first * size]

    draw = partial(
        sample, flow, labels=None if folder.labels(0) is None else read(folder.labels),
        latents=draw_latents(len(rows), config.num_tokens, config.token_channels, spec.seed, rows.start),
        settings=SamplingSettings(spec.guidance, spec.denoise), certify=spec.certify,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The folder's outcome tells of samples that are not finite.
        loop = draw(strategy="sequential", sensitivity=True)
        if spec.has_pictures:  # The folder has only their 8-bit values, and other samples as they were drawn.
            samples = draw(strategy=folder.strategy()).x.cpu()
        else:
            samples = read(folder.tokens if flow.image_shape is None else folder.images)
    exact = loop.x.cpu().float()
    pixels = pixel_difference(read(folder.images), quantize(exact)) if spec.has_pictures else None
    return replace(sample_errors(samples, exact), pixels=pixels), loop.outcome.sensitivity


def _measure_likelihoods(flow: Flow, test: ImageDataset, seed: int, index: Tensor) -> tuple[float, int | None]:
    """Returns the sum of the bits per dimension of images, and the number of them whose class the flow finds."""
    batch = flow, test, Noise(flow.config.noise_std), seed, index
    return total_bits_per_dim(*batch), None if test.labels is None else count_correct_classes(*batch)


def _real_images(features: FeatureFunction, real: ImageDataset, index: Tensor) -> Tensor:
    """Returns real images; as in the original code of TarFlow, half of Inception's are mirrored."""
    images = real.images[index]
    if not isinstance(features, InceptionFeatures):
        return images
    is_mirrored = torch.rand(len(real), generator=torch.Generator().manual_seed(0)) < 0.5
    return torch.where(is_mirrored[index].view(-1, 1, 1, 1), images.flip(-1), images)


def _extract(features: FeatureFunction, load: Callable[[], Tensor]) -> Tensor:
    """Returns the features of the images that a function loads."""
    values = extract_features(features, [load()])
    if not torch.isfinite(values).all():
        raise InputValueError("features that are not finite: check the images and --features")
    return values
