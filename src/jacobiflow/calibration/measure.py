"""Calibration of a flow: the metrics of its blocks over images, and the sweeps that the blocks take."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from jacobiflow import jobs
from jacobiflow.calibration.convergence import ConvergenceCurve, gamma_norm, measure_distances
from jacobiflow.calibration.metrics import NORMS, Norm
from jacobiflow.calibration.report import GUESSES, CalibrationReport, CalibrationSettings, LatentSource
from jacobiflow.calibration.solutions import BlockSolution, exact_solutions
from jacobiflow.calibration.statistics import CalibrationStatistics, ImageSet, Means
from jacobiflow.errors import InputTypeError, InputValueError
from jacobiflow.fixed_point import Segments
from jacobiflow.jobs import JobStore, Unit, UnitOutput
from jacobiflow.models.checkpoints.fingerprint import fingerprint, weights_sha256
from jacobiflow.models.contexts import ContextLike, Labels, labels_or_context
from jacobiflow.models.flow import Flow, check_flow
from jacobiflow.models.latents import FIRST_CALIBRATION_LATENT, MAX_SAMPLES, draw_latents
from jacobiflow.utils.checks import check_choice, check_count, check_flag, check_path, check_seed
from jacobiflow.utils.deprecation import renamed_arguments
from jacobiflow.utils.progress import Progress
from jacobiflow.utils.serialization import decode, encode
from jacobiflow.utils.timing import describe_machine

# The least number of tokens in a segment; the exact loop has one.
_MIN_SEGMENT_TOKENS = 4
_CURVE_BATCH = 8  # samples that are swept together, until the slowest of them converges
_GAMMA_SAMPLES = 8  # each sample costs some thirty backward passes for each block


@renamed_arguments(traced="num_convergence_samples")
def calibrate(
    flow: Flow,
    images: ImageSet,
    labels: Labels | None = None,
    norm: Norm = 2,
    *,
    context: ContextLike | None = None,
    segments: int = 8,
    num_convergence_samples: int = 32,
    per_class: bool = False,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
    out: str | Path | None = None,
) -> CalibrationReport:
    """Measures the paper's metrics of each block, and the sweeps that they predict.

    The metrics of a block are IGM = |g(X^(0)) - X*| for each guess (eq. 4 of the paper) and CRM = |Sigma^-1 X| |W_s| +
    |W_u| (eq. 5). They are norms of (T, C) matrices, which are means over the images. On fewer samples the distance to
    the solution is measured sweep by sweep, and the norm of the error matrix (Appendix A). Of a view under guidance
    (`flow.guided`) the metrics are those of the guided map at the images' own tokens, and sweeps start from fresh
    latents only.

    Args:
        flow: The model, or a view of it under guidance.
        images: (N, C, H, W), two or more, like those that the flow was trained on, with the same noise: a tensor, a
            NumPy array, or anything with a length that a tensor of indices can index.
        labels: (N,) their classes, or one class for all. `None`, or a label below 0, takes the unconditional row.
        context: In place of labels: what the flow takes, such as prompts.
        norm: Norm of `report.igm` and `report.crm`: 2, "fro" or 1. `report.metrics` has all three.
        segments: Number of segments of a tough block that have metrics of their own.
        num_convergence_samples: Number of samples whose sweeps are measured: images, evenly spaced, and as many fresh
            latents under the images' labels.
        per_class: Also measure the metrics over the images of each label alone (Appendix E). One below 0 is that of the
            unconditional row.
        batch_size: Images in memory at a time.
        seed: Fixes the fresh latents. `jacobiflow.sample` never draws the same ones.
        progress: Is called after each step.
        out: Folder for report.json and the measurements. If a call is interrupted, the same call continues from them.
            Processes that make the same call at the same time share the work.

    Raises:
        ValueError: If a fresh latent overflows in the exact inverse, or if `out` holds another calibration or other
            files.

    Example:
        >>> flow = jf.load("digits-p1")
        >>> images = jf.sample(flow, 4, seed=1, settings=None).images  # better 128 images like the training's
        >>> len(jf.calibrate(flow, images, num_convergence_samples=1).crm)
        4
    """
    job = CalibrationJob(
        flow, images, labels, norm, context=context, segments=segments,
        num_convergence_samples=num_convergence_samples, per_class=per_class, batch_size=batch_size, seed=seed,
    )  # fmt: skip
    if out is not None:
        check_path("out", out)
    with TemporaryDirectory() if out is None else nullcontext(out) as folder:
        return CalibrationReport.from_json(jobs.run(job, folder, progress=progress).result)


@dataclass(frozen=True)
class CalibrationSpec(CalibrationSettings):
    """All that the measurements of a calibration depend on; see `CalibrationStatistics`."""

    classes: tuple[int, ...]
    batch_size: int
    precision: str
    flow_sha256: str
    weights_sha256: str
    images_sha256: str
    labels_or_context_sha256: str


class CalibrationJob(jobs.Job):
    """The job of `calibrate`; its arguments are those of `calibrate`."""

    kind, version, oldest, result_name = "calibration", 3, 1, "report.json"
    remedy = "give another folder, or remove this one"

    def __init__(
        self, flow: Flow, images: ImageSet, labels: Labels | None = None, norm: Norm = 2, *,
        context: ContextLike | None = None, segments: int, num_convergence_samples: int, per_class: bool,
        batch_size: int, seed: int,
    ) -> None:  # fmt: skip
        check_flow(flow)
        norm = check_choice("norm", norm, NORMS)
        num_samples = check_count("num_convergence_samples", num_convergence_samples, maximum=MAX_SAMPLES)
        batch_size = check_count("batch_size", batch_size, maximum=MAX_SAMPLES)
        segments, seed = check_count("segments", segments), check_seed(seed)
        Segments(segments).check(flow.config.num_tokens)
        check_flag("per_class", per_class)
        _check_images(flow, images)
        if per_class and (labels is None or not flow.config.num_classes):
            raise InputValueError(
                "needs the labels of the images, and a flow with classes; leave it out",
                argument="per_class",
                value=True,
            )
        checked = flow.context_kind.resolve(labels_or_context(labels, context), len(images))
        values = checked.values
        classes = sorted(set(values.tolist())) if per_class and values is not None else []
        self.settings = CalibrationSettings(
            len(images), values is not None, norm, flow.guidance, segments, min(num_samples, len(images)), seed
        )
        self.flow, self.statistics = flow, CalibrationStatistics(flow, images, checked, classes, batch_size)
        num_samples = self.settings.num_convergence_samples
        most = flow.config.num_tokens // _MIN_SEGMENT_TOKENS
        self.segment_counts = sorted({1, segments, *(2**k for k in range(1, most.bit_length()))})
        # Sweeps are measured for these images.
        self._index = torch.arange(num_samples, device="cpu") * len(images) // num_samples
        # Under guidance images have no latents.
        self.sources: tuple[LatentSource, ...] = ("noise",) if flow.guidance else ("images", "noise")
        self.machine = describe_machine(flow.var.device)
        self.spec = CalibrationSpec(
            **vars(self.settings), classes=tuple(classes), batch_size=batch_size, precision=flow.precision,
            flow_sha256=fingerprint(flow), weights_sha256=weights_sha256(flow),
            images_sha256=_sha256(self.statistics.read(rows) for rows in chain(*self.statistics.chunks)),
            labels_or_context_sha256=_sha256([] if values is None else [values]),
        )  # fmt: skip

    def stages(self, store: JobStore) -> Iterator[list[Unit]]:
        """Yields units without requirements, those that need the mean parameters, and those that need the metrics."""
        chunks, blocks = range(len(self.statistics.chunks)), self.statistics.blocks
        solutions = [Unit(f"solutions-{source}", partial(self._solve, source), len(blocks)) for source in self.sources]
        yield [*solutions, *(Unit(f"parameters-{i:02}", partial(self._sum_parameters, i)) for i in chunks)]
        means = self._read_means(store, "parameters")
        residuals = (Unit(f"residuals-{i:02}", partial(self._sum_residuals, means, i)) for i in chunks)
        gamma = (Unit(f"gamma-{i}", partial(self._measure_gamma, store, i)) for i in blocks)
        curves = (self._curves(store, *names) for names in product(blocks, self.sources, GUESSES))
        yield [*residuals, *gamma, *curves]
        tough = self._best_guesses(self._read_means(store, "parameters", "residuals"))
        counts = self.segment_counts
        yield [self._curves(store, i, "noise", guess, n) for i, guess in tough.items() for n in counts]

    def _sum_parameters(self, chunk: int, progress: Progress | None) -> UnitOutput:
        return _output(f"parameters-{chunk:02}", self.statistics.sum_parameters(chunk))

    def _sum_residuals(self, means: Means, chunk: int, progress: Progress | None) -> UnitOutput:
        sums = self.statistics.sum_residuals(chunk, means, self.settings.segments, self.settings.norm)
        return _output(f"residuals-{chunk:02}", sums)

    def _read_means(self, store: JobStore, *kinds: str) -> Means:
        """Returns the means of the sums of these kinds, "parameters" and "residuals"."""
        chunks = product(kinds, range(len(self.statistics.chunks)))
        return self.statistics.means(load_file(store.path / _file(f"{kind}-{i:02}")) for kind, i in chunks)

    def _solve(self, source: LatentSource, progress: Progress | None) -> UnitOutput:
        """Encodes images, or solves the blocks at fresh latents under the context of these images."""
        if source == "images":
            solutions = self.statistics.image_solutions(self._index)
        else:
            shape = len(self._index), self.flow.config.num_tokens, self.flow.config.token_dim
            latents = draw_latents(*shape, self.spec.seed, FIRST_CALIBRATION_LATENT)
            context = self.statistics.context_at(self._index)
            solutions = exact_solutions(self.flow, latents, context, self.spec.batch_size, progress)
        tensors = {name: torch.stack([getattr(each, name) for each in solutions]) for name in ("x", "z")}
        return _output(f"solutions-{source}", tensors)

    def _read_solution(self, store: JobStore, source: LatentSource, block: int) -> BlockSolution:
        # A slice would be made on the default device.
        with torch.device("cpu"), safe_open(store.path / _file(f"solutions-{source}"), "pt") as file:
            x, z = (file.get_slice(name)[block].to(self.flow.var.device) for name in ("x", "z"))
        return BlockSolution(x, z, self.statistics.context_at(self._index))

    def _measure_gamma(self, store: JobStore, block: int, progress: Progress | None) -> UnitOutput:
        """Measures the norm of a block's error matrix at the first solutions."""
        solution = next(self._read_solution(store, self.sources[0], block).split(_GAMMA_SAMPLES))
        norms = [gamma_norm(self.flow.inverse_block(block), *batch) for batch in solution.split(self.spec.batch_size)]
        return UnitOutput(value=torch.cat(norms).tolist())

    def _curves(self, store: JobStore, block: int, source: LatentSource, guess: str, num_segments: int = 1) -> Unit:
        """Returns the unit of the convergence curve of each segment of a block."""

        def run(progress: Progress | None) -> UnitOutput:
            batches = self._read_solution(store, source, block).split(min(self.spec.batch_size, _CURVE_BATCH))
            distances = [
                measure_distances(self.flow.inverse_block(block), x, z, GUESSES[guess], context, num_segments)
                for x, z, context in batches
            ]
            return UnitOutput(value=encode([*map(ConvergenceCurve.from_distances, zip(*distances, strict=True))]))

        return Unit(_curves_name(block, source, guess, num_segments), run)

    def _best_guesses(self, means: Means) -> dict[int, str]:
        """Returns the best guess by IGM of each tough block."""
        best = self.statistics.metrics(means, self.settings.norm, self.statistics.blocks).best_guess
        return {i: best(i) for i in self.statistics.tough_blocks(means, self.settings.norm)}

    def reduce(self, store: JobStore) -> Any:
        """Returns the report."""
        config, settings, blocks = self.flow.config, self.settings, self.statistics.blocks
        means = self._read_means(store, "parameters", "residuals")
        metrics, tough = partial(self.statistics.metrics, means), self._best_guesses(means)

        def read(block: int, source: LatentSource, guess: str, num_segments: int = 1) -> tuple[ConvergenceCurve, ...]:
            return decode(tuple[ConvergenceCurve, ...], store.value(_curves_name(block, source, guess, num_segments)))

        return CalibrationReport(
            fingerprint=self.spec.flow_sha256,
            num_tokens=config.num_tokens,
            token_dim=config.token_dim,
            settings=settings,
            metrics={norm: metrics(norm, blocks) for norm in NORMS},
            segment_metrics={i: metrics(settings.norm, [i], settings.segments) for i in tough},
            class_metrics={label: metrics(settings.norm, blocks, group=label) for label in self.spec.classes},
            curves={
                source: tuple({guess: read(i, source, guess)[0] for guess in GUESSES} for i in blocks)
                for source in self.sources
            },
            segment_curves={
                i: {n: read(i, "noise", guess, n) for n in self.segment_counts} for i, guess in tough.items()
            },
            gamma=tuple(tuple(store.value(f"gamma-{i}")) for i in blocks),
        ).to_json()


def _check_images(flow: Flow, images: ImageSet) -> None:
    if isinstance(images, Tensor):
        flow.check_data(images, "images")
    try:
        num = len(images)
        images[torch.tensor([0, 0], device="cpu")]
    except (TypeError, LookupError) as error:
        kind = type(images).__name__
        raise InputTypeError(f"images of type {kind}: give a tensor, or what a tensor can index") from error
    if num < 2:
        raise InputValueError(f"images: {num} of them; give at least 2, better 128, to take means over")


def _curves_name(block: int, source: LatentSource, guess: str, num_segments: int) -> str:
    """Returns the name of the unit of a block's convergence curves."""
    return f"curves-{block}-{source}-{guess}-{num_segments}"


def _output(unit: str, tensors: Mapping[str, Tensor]) -> UnitOutput:
    """Returns tensors as the file of a unit."""
    return UnitOutput({_file(unit): save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})})


def _file(unit: str) -> str:
    """Returns the name of the file of a unit."""
    return f"units/{unit}.safetensors"


def _sha256(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
