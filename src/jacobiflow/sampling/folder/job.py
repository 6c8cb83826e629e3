"""The job that draws samples into a folder."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from jacobiflow import jobs
from jacobiflow.data import image_grid, quantize, scale
from jacobiflow.data.grid import PICTURE_CHANNELS
from jacobiflow.errors import InputValueError
from jacobiflow.fixed_point import CertifyMode
from jacobiflow.jobs import JobStore, Unit, UnitOutput
from jacobiflow.models.contexts import ContextLike, Labels, class_names
from jacobiflow.models.flow import Flow, check_flow
from jacobiflow.models.latents import MAX_SAMPLES, draw_latents
from jacobiflow.models.memory import find_batch_size
from jacobiflow.planner import Strategy
from jacobiflow.sampling.encoding import npz_bytes, pillow, png_bytes
from jacobiflow.sampling.folder.reader import SampleFolder
from jacobiflow.sampling.folder.spec import (
    KIND,
    OLDEST,
    RESULT,
    STRATEGY,
    VERSION,
    Files,
    SampleSpec,
    labels_or_context_sha256,
)
from jacobiflow.sampling.request import SamplingRequest, Settings
from jacobiflow.sampling.result import Outcome, Samples
from jacobiflow.utils import serialization
from jacobiflow.utils.checks import check_choice, check_count, check_flag, check_kind, check_path, check_seed
from jacobiflow.utils.files import MANIFEST, json_bytes, write_atomically
from jacobiflow.utils.progress import Progress
from jacobiflow.utils.timing import describe_machine

_BATCH_SIZE = 64  # Default number of samples in a batch.
_MAX_AUTO_BATCH_SIZE = 65_536
_SHARD_SIZE = 1024  # Default number of samples in a shard, about.
_SHEET_IMAGES = 100  # Samples in the picture.


def sample_to_folder(
    flow: Flow,
    num: int,
    out: str | Path,
    labels: Labels | None = None,
    seed: int = 0,
    *,
    context: ContextLike | None = None,
    settings: Settings = "recommended",
    strategy: str | Path | Strategy = "auto",
    tolerance: float | None = None,
    certify: CertifyMode = True,
    sensitivity: bool = False,
    log_prob: bool | None = None,
    batch_size: int | Literal["auto"] | None = None,
    shard_size: int | None = None,
    files: Files = "npz",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> SampleFolder:
    """Draws samples into a folder, or resumes a run that was stopped.

    Any number of processes may call it with the same arguments: they share the shards. The latent of sample i depends
    on `seed` and i only. The number of processes and interruptions do not change the bytes of a shard. Another thread
    count, device or batch size changes it by rounding: by at most one 8-bit level, if the tolerance is below half a
    level (4e-3). Shards that are missing or do not match their checksum are drawn again. "auto" is planned once, by
    the first process. A larger `num` adds samples.

    The arguments that are not listed are those of `jacobiflow.sample`.

    Args:
        num: The number of samples.
        out: A new or empty folder, or one with samples of the same settings.
        batch_size: Samples in the network at a time. By default that of samples in `out`, else `num`, at most 64;
            "auto": that of samples in `out`, else as many as fit in memory.
        shard_size: Samples in a shard, a multiple of `batch_size`; about 1,024 by default.
        files: "npz", or "png" for a PNG of each sample too, in folders by class.
        overwrite: Whether to replace samples of other settings, or complete ones.
        progress: Called with the number of samples that are drawn.

    Returns:
        The folder, in which all samples are drawn. A warning tells of samples that overflow, are not certified, or are
        sensitive to rounding.

    Raises:
        JobFolderError: If `out` has other samples, or other files.

    Example:
        >>> import tempfile, jacobiflow as jf
        >>> out = tempfile.mkdtemp()
        >>> folder = jf.sample_to_folder(jf.load("digits-maf"), 8, out, batch_size=4, shard_size=4)
        >>> folder.spec.num_shards, folder.num_new
        (2, 8)
        >>> jf.sample_to_folder(jf.load("digits-maf"), 8, out, batch_size=4, shard_size=4).num_new
        0
    """
    num, seed = check_count("num", num, maximum=MAX_SAMPLES), check_seed(seed)
    check_flow(flow)
    check_path("out", out)
    adopts = (batch_size in (None, "auto"), batch_size in (None, "auto") and shard_size is None)
    if batch_size == "auto":  # The samples of a folder may have been begun with more memory.
        has_samples = not overwrite and (Path(out) / MANIFEST).exists()
        batch_size = None if has_samples else find_batch_size(flow, min(num, _MAX_AUTO_BATCH_SIZE))
    batch_size, shard_size = _resolve_sizes(num, batch_size, shard_size)
    check_flag("overwrite", overwrite)
    check_kind("progress", progress, Callable | None, "a function of done, total and what, or None")
    _check_file_format(flow, files)
    request = SamplingRequest.resolve(
        flow, num, labels, context=context, settings=settings, strategy=strategy, tolerance=tolerance, certify=certify,
        sensitivity=sensitivity, batch_size=batch_size, log_prob=log_prob,
    )  # fmt: skip
    name = "a Strategy" if isinstance(strategy, Strategy) else str(strategy)
    spec = SampleSpec.of(
        request, name, num=num, seed=seed, batch_size=batch_size, shard_size=shard_size, files=files
    )  # fmt: skip
    job = SampleJob(spec, describe_machine(flow.var.device), request, _list_prompts(context, num), *adopts)
    run = jobs.run(job, out, overwrite=overwrite, progress=progress)
    folder = SampleFolder(Path(out), run.job.spec, run.missing_size, run.seconds, run.should_print)
    outcome = serialization.decode(Outcome, run.result)
    if outcome.has_shortfall and run.should_print:
        warnings.warn(str(outcome), stacklevel=2)
    return folder


@dataclass(frozen=True)
class SampleJob(jobs.Job):
    """Draws samples: the first unit plans the strategy, and each other one draws a shard.

    Attributes:
        prompts: The prompt of each sample; empty without prompts.
        adopts_batch_size: Whether the batch size of samples in the folder replaces that of the spec.
        adopts_shard_size: The same of the shard size.
    """

    kind, version, oldest, result_name = KIND, VERSION, OLDEST, RESULT

    spec: SampleSpec
    machine: Mapping[str, Any]
    request: SamplingRequest
    prompts: Sequence[str] = ()
    adopts_batch_size: bool = False
    adopts_shard_size: bool = False

    def stages(self, store: JobStore) -> Iterator[list[Unit]]:
        """Yields the plan, then the shards with their numbers of samples."""
        yield [Unit(STRATEGY, self._plan)]
        spec, draw = self.spec, partial(self._draw_shard, Strategy.load(store.path / "strategy.json"))
        yield [Unit(spec.unit(i), partial(draw, i), len(spec.span(i))) for i in range(spec.num_shards)]

    @torch.no_grad()
    def _plan(self, progress: Progress | None) -> UnitOutput:
        strategy = self.request.plan(min(self.spec.batch_size, self.spec.num))
        return UnitOutput({"strategy.json": json_bytes(strategy.to_json())})

    @torch.no_grad()
    def _draw_shard(self, strategy: Strategy, index: int, progress: Progress | None) -> UnitOutput:
        rows, config = self.spec.span(index), self.request.flow.config
        latents = draw_latents(len(rows), config.num_tokens, config.token_dim, self.spec.seed, rows.start)
        request = self.request[rows.start : rows.stop]
        options = replace(request.options, batch_size=self.spec.batch_size)
        samples = replace(request, strategy=strategy, options=options).run(latents, progress)
        return UnitOutput(self._files(index, samples), serialization.encode(samples.outcome))

    def reduce(self, store: JobStore) -> Any:
        """Saves the first samples as one picture, and returns the outcome of all."""
        if self.spec.has_pictures and find_spec("matplotlib") is not None:
            write_atomically(store.path / "samples.png", self._first_samples(store))
        values = [store.value(self.spec.unit(i)) for i in range(self.spec.num_shards)]
        return serialization.encode(Outcome.merge([serialization.decode(Outcome, value) for value in values]))

    def _first_samples(self, store: JobStore) -> bytes:
        """Returns a PNG of the first samples, at most 100."""
        spec, png = self.spec, io.BytesIO()
        num = min(spec.num, _SHEET_IMAGES)
        samples = SampleFolder(store.path, spec)
        images = torch.cat([samples.images(i) for i in range(-(-num // spec.shard_size))])[:num]
        labels = None if spec.num_classes == 0 else self.request.context.values
        names = self.prompts[:num] or class_names(None if labels is None else labels[:num], spec.classes)
        image_grid(scale(images), min(10, num), names=names).save(png, "png")
        return png.getvalue()

    def resume(self, earlier: Mapping[str, Any]) -> SampleJob:
        """Returns this job with the sizes of the folder, and its name of the same strategy."""
        folder, spec = serialization.decode(SampleSpec, earlier), self.spec
        if self.adopts_batch_size:
            spec = replace(spec, batch_size=folder.batch_size)
        if self.adopts_shard_size:
            spec = replace(spec, shard_size=folder.shard_size)
        if spec.strategy_sha256 is not None and spec.strategy_sha256 == folder.strategy_sha256:
            spec = replace(spec, strategy=folder.strategy)
        return replace(self, spec=spec)

    def earlier_spec(self, earlier: Mapping[str, Any]) -> SampleSpec:
        """Returns the spec of fewer samples, under the first of the labels."""
        folder = serialization.decode(SampleSpec, earlier)
        if folder.num > self.spec.num:  # It differs in `num`; other labels may follow from that.
            return replace(self.spec, labels_or_context_sha256=folder.labels_or_context_sha256)
        labels = labels_or_context_sha256(self.request.context[: folder.num])
        return replace(self.spec, num=folder.num, labels_or_context_sha256=labels)

    def _files(self, index: int, samples: Samples) -> dict[str, bytes]:
        """Returns the files of a shard. A picture with a value that is not finite is black."""
        spec, shape = self.spec, tuple(samples.x.shape[1:])
        if shape != spec.shape:
            raise InputValueError(
                f"samples of shape {shape}, but the flow's config says {spec.shape}, which a folder stores; draw them "
                "with jacobiflow.sample"
            )
        nonfinite = ~torch.isfinite(samples.x).flatten(1).all(dim=1)
        name, stored = "images" if len(shape) == 3 else "tokens", samples.x.float()
        if spec.has_pictures:
            pictures = samples.x.masked_fill(nonfinite.view(-1, 1, 1, 1), -1.0)
            name, stored = "arr_0", quantize(pictures).permute(0, 2, 3, 1)
        labels = None if samples.context is None or samples.context.is_floating_point() else samples.context
        arrays = {
            name: stored, "labels": labels, "log_prob": samples.log_prob, "residual": samples.residual,
            "sensitivity": samples.sensitivity, "used_fallback": samples.used_fallback, "nonfinite": nonfinite,
        }  # fmt: skip
        files = {f"shards/{index:05}.npz": npz_bytes(arrays)}
        if spec.files == "png":
            folders = ["images"] * len(stored)
            if labels is not None:
                folders = [f"images/{spec.class_folder(label)}" for label in labels.tolist()]
            for i, parent, pixels in zip(spec.span(index), folders, stored.cpu(), strict=True):
                files[f"{parent}/{i:08}.png"] = png_bytes(pixels)
        return files


def _list_prompts(context: ContextLike | None, num: int) -> Sequence[str]:
    """Returns the prompt of each of `num` samples; nothing if the context is no text."""
    if isinstance(context, str):
        return [context] * num
    are_prompts = isinstance(context, Sequence) and all(isinstance(prompt, str) for prompt in context)
    return context if are_prompts else ()  # type: ignore[return-value]


def _resolve_sizes(num: int, batch_size: int | None, shard_size: int | None) -> tuple[int, int]:
    """Returns the batch size and the shard size, or their defaults."""
    if shard_size is not None:
        shard_size = check_count("shard_size", shard_size, maximum=MAX_SAMPLES)
    if batch_size is None:
        most = min(num, _BATCH_SIZE)
        batch_size = most if shard_size is None else max(n for n in range(1, most + 1) if shard_size % n == 0)
    batch_size = check_count("batch_size", batch_size, maximum=MAX_SAMPLES)
    shard_size = max(_SHARD_SIZE // batch_size, 1) * batch_size if shard_size is None else shard_size
    if shard_size % batch_size:
        message = f"give a multiple of the batch size, {batch_size}"
        raise InputValueError(message, argument="shard_size", value=shard_size)
    return batch_size, shard_size


def _check_file_format(flow: Flow, files: Any) -> None:
    if check_choice("files", files, get_args(Files)) == "png":
        pillow()
        if flow.image_shape is None:
            raise InputValueError("for flows over images; give 'npz'", argument="files", value="'png'")
        if flow.image_shape[0] not in PICTURE_CHANNELS:
            message = f"for grey and colour images, and this flow has {flow.image_shape[0]} channels; give 'npz'"
            raise InputValueError(message, argument="files", value="'png'")
