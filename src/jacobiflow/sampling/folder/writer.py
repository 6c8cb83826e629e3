"""Drawing samples into a folder, by one or more processes."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any, get_args

import torch

from jacobiflow.blocks.context import Context
from jacobiflow.calibration import CalibrationReport
from jacobiflow.data.grid import PICTURE_CHANNELS
from jacobiflow.distributed import Part, Processes
from jacobiflow.distributed.parts import forget_parts, lock_folder, start_part
from jacobiflow.errors import InputValueError
from jacobiflow.fixed_point import CertifyMode
from jacobiflow.fixed_point.options import SolveOptions
from jacobiflow.models.checkpoints.fingerprint import fingerprint
from jacobiflow.models.flow import Flow, check_flow
from jacobiflow.models.labels import ContextLike, Labels
from jacobiflow.models.latents import MAX_SAMPLES, draw_latents
from jacobiflow.planner import Strategy, choose, is_auto
from jacobiflow.sampling.folder.manifest import Files, Manifest, SampleFolderError, context_sha256
from jacobiflow.sampling.folder.reader import STRATEGY, SampleFolder
from jacobiflow.sampling.result import pillow
from jacobiflow.sampling.sample import (
    Outputs,
    Settings,
    check_log_prob,
    resolve_settings,
    sample_with_strategy,
    warn_if_guidance_is_idle,
)
from jacobiflow.utils.checks import (
    check_choice,
    check_count,
    check_flag,
    check_kind,
    check_path,
    check_seed,
    format_value,
)
from jacobiflow.utils.files import MANIFEST, check_own, json_bytes, sha256, write_atomically
from jacobiflow.utils.progress import Progress
from jacobiflow.utils.timing import describe_machine

_BATCH_SIZE = 64  # Default number of samples in a batch.
_SHARD_SIZE = 1024  # Default number of samples in a shard, about.
_SAMPLES = "samples"  # What progress counts.


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
    batch_size: int | None = None,
    shard_size: int | None = None,
    files: Files = "npz",
    model: str = "",
    report: CalibrationReport | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    processes: Processes | None = None,
    part: Part | None = None,
) -> SampleFolder:
    """Draws samples into a folder, or resumes a run that was stopped.

    The latent of sample i depends on `seed` and i only. The number of processes and interruptions do not change the
    bytes of a shard. Another thread count, device or batch size changes it by rounding: by at most one 8-bit level, if
    the tolerance is below half a level (4e-3). Shards that are missing or do not match their checksum are drawn again.
    The folder stores the strategy, so "auto" is planned once.

    Arguments that are not listed are those of `jacobiflow.sample`.

    Args:
        num: The number of samples.
        out: A new or empty folder, or one with samples of the same settings.
        batch_size: Samples in the network at a time; by default `num`, at most 64.
        shard_size: Samples in a shard, a multiple of `batch_size`; about 1,024 by default.
        files: "npz", or "png" for a PNG of each sample too, in folders by class.
        model: The name of the model in the manifest.
        report: A report of `calibrate`. "auto" plans from it; other strategies take their guesses from it.
        overwrite: Whether to remove the samples of an earlier run first.
        progress: Called with the number of samples that are drawn.
        processes: The processes that share the work, see `jacobiflow.processes`. Each of them calls this function.
        part: One of several jobs that share the work without communication, such as `jacobiflow.Part(1, 8)`. All parts
            get the same other arguments; the last one to end completes the folder.

    Returns:
        The folder. It is complete unless other parts are missing. A warning tells of samples that overflow, are not
        certified, or are sensitive to rounding.

    Raises:
        SampleFolderError: If `out` has other samples, or the disk is too small.
        FolderInUseError: If another run, or the same part, is writing to `out`.

    Example:
        >>> import tempfile, jacobiflow as jf
        >>> out = tempfile.mkdtemp()
        >>> folder = jf.sample_to_folder(jf.load("digits-maf"), 8, out, batch_size=4, shard_size=4)
        >>> folder.manifest.num_shards, folder.num_new
        (2, 8)
        >>> jf.sample_to_folder(jf.load("digits-maf"), 8, out, batch_size=4, shard_size=4).num_new
        0
    """
    num, seed = check_count("num", num, maximum=MAX_SAMPLES), check_seed(seed)
    batch_size, shard_size = _sizes(num, batch_size, shard_size)
    check_flow(flow)
    check_path("out", out)
    check_kind("model", model, str, "a name")
    check_flag("overwrite", overwrite)
    check_flag("sensitivity", sensitivity)
    check_kind("progress", progress, Callable | None, "a function of done, total and what, or None")
    processes = Processes() if processes is None else processes
    part = Part() if part is None else part
    check_kind("processes", processes, Processes, "what `with jacobiflow.processes()` gives")
    check_kind("part", part, Part, "a jacobiflow.Part")
    if overwrite and part.count > 1:
        raise InputValueError("overwrite=True: would remove the samples of other parts; remove the folder first")
    tolerance = SolveOptions(tolerance, certify).tolerance
    _check_file_format(flow, files)
    checked = flow.check_one_context(labels, context, num)
    flow, denoise = resolve_settings(flow, settings, checked)
    warn_if_guidance_is_idle(flow, checked)
    config = flow.config
    manifest = Manifest(
        num=num, shape=flow.image_shape or (config.num_tokens, config.token_channels), num_tokens=config.num_tokens,
        seed=seed, context_sha256=context_sha256(checked), num_classes=config.num_classes, batch_size=batch_size,
        shard_size=shard_size, files=files, model=model, fingerprint=fingerprint(flow), dtype=flow.precision,
        strategy="a Strategy" if isinstance(strategy, Strategy) else str(strategy), strategy_sha256="",
        guidance=flow.guidance, denoise=float(denoise),
        tolerance=tolerance, certify=certify,
        log_prob=check_log_prob(flow, log_prob, denoise), sensitivity=sensitivity, classes=tuple(flow.classes),
        machine=describe_machine(flow.var.device),
    )  # fmt: skip
    folder = SampleFolder(Path(out), manifest)
    plan = partial(choose, flow, strategy, batch_size, tolerance=manifest.tolerance, report=report)
    keep_strategy = isinstance(strategy, str) and is_auto(strategy)  # Plans by timings differ from run to run.
    with ExitStack() as locks:
        start = partial(_start_or_resume, folder, checked, plan, keep_strategy, overwrite, part, locks)
        folder, todo = processes.run_on_rank_zero(start)
        processes.check_sees(folder.path / MANIFEST)
        started = perf_counter()
        _draw_shards(flow, folder, todo, checked, processes, progress)
        processes.gather(None)  # The records of all processes are on the disk.
        seconds = perf_counter() - started
        folder = processes.run_on_rank_zero(partial(_finish, folder))
    folder = replace(folder, num_new=folder.manifest.num_in(todo), seconds=seconds)
    if processes.rank == 0 and folder.is_complete and (outcome := folder.outcome()).has_shortfall:
        warnings.warn(str(outcome), stacklevel=2)
    return folder


def _sizes(num: int, batch_size: int | None, shard_size: int | None) -> tuple[int, int]:
    """Returns the batch size and the shard size, or their defaults."""
    batch_size = min(num, _BATCH_SIZE) if batch_size is None else batch_size
    batch_size = check_count("batch_size", batch_size, maximum=MAX_SAMPLES)
    shard_size = max(_SHARD_SIZE // batch_size, 1) * batch_size if shard_size is None else shard_size
    shard_size = check_count("shard_size", shard_size, maximum=MAX_SAMPLES)
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


def _start_or_resume(
    new: SampleFolder, context: Context, plan: Callable[[], Strategy], keep_strategy: bool, overwrite: bool,
    part: Part, locks: ExitStack,
) -> tuple[SampleFolder, list[int]]:  # fmt: skip
    """Locks the part, and returns the folder with the shards to draw. An error comes before any change."""
    check_own(new.path, new.manifest.kind)
    new.check_no_links()
    with start_part(new.path, part, locks) as has_others:
        earlier = SampleFolder.open(new.path) if (new.path / MANIFEST).exists() else None
        is_new = earlier is None or overwrite or not any(map(earlier.record, range(earlier.manifest.num_shards)))
        if earlier is None or (is_new and not has_others):
            return _start(new, earlier, plan(), overwrite, part)
        return _resume(new, earlier, context, None if keep_strategy else plan(), part, has_others)


def _start(
    new: SampleFolder, earlier: SampleFolder | None, plan: Strategy, overwrite: bool, part: Part
) -> tuple[SampleFolder, list[int]]:
    """Starts a run, and removes the samples of an earlier run."""
    strategy = json_bytes(plan.to_json())
    folder = _with(new, strategy_sha256=sha256(strategy))
    todo = list(part.share(range(folder.manifest.num_shards)))
    if not overwrite:
        _check_space(folder, todo)
    if earlier is not None:
        earlier.clear()
    folder.remove_partials()
    folder.save_manifest()
    write_atomically(folder.path / STRATEGY, strategy)
    return folder, todo


def _resume(
    new: SampleFolder, earlier: SampleFolder, context: Context, plan: Strategy | None, part: Part, has_others: bool
) -> tuple[SampleFolder, list[int]]:
    """Joins other parts, or resumes an earlier run of the same settings, which may have fewer samples."""
    previous = earlier.manifest
    settings = replace(
        new.manifest,
        context_sha256=context_sha256(context[: previous.num]),
        strategy_sha256=previous.strategy_sha256 if plan is None else sha256(json_bytes(plan.to_json())),
    )
    previous.check_resumes(settings, new.path)
    if has_others and settings.num != previous.num:
        raise SampleFolderError(f"{new.path}: parts of {previous.num:,} samples are running; give num={previous.num}")
    earlier.strategy()  # Raises an error if the file was changed.
    folder = _with(
        new,
        strategy_sha256=previous.strategy_sha256,
        machine=previous.machine,
        checksums=previous.checksums,
        classes=previous.classes,  # The folders of its PNGs keep their names.
    )
    todo = [index for index in part.share(range(folder.manifest.num_shards)) if not folder.verify(index)]
    if todo:
        if damaged := [index for index in todo if folder.record(index) is not None]:
            warnings.warn(f"{new.path}: shards {format_value(damaged)} were damaged, and are drawn again", stacklevel=2)
        if previous.machine != new.manifest.machine:
            message = "begun on another machine or by other versions: equal to rounding, not to the bit"
            warnings.warn(f"{new.path}: {message}", stacklevel=2)
        _check_space(folder, todo)
        folder = _with(folder, checksums=None)
        if folder.manifest != previous:
            folder.save_manifest()
    if not has_others:  # Temporary files of other parts may be in use.
        folder.remove_partials()
    for index in todo:
        folder.remove_record(index)
    return folder, todo


@torch.no_grad()
def _draw_shards(
    flow: Flow, folder: SampleFolder, todo: Sequence[int], context: Context,
    processes: Processes, progress: Progress | None,
) -> None:  # fmt: skip
    """Draws the shards that this process claims."""
    manifest, config, strategy = folder.manifest, flow.config, folder.strategy()
    options = SolveOptions(certify=manifest.certify, batch_size=manifest.batch_size)
    outputs = Outputs(manifest.denoise, manifest.log_prob, manifest.sensitivity)
    num = manifest.num_in(todo)
    num_kept = manifest.num - num
    if progress is not None and todo:
        progress(num_kept, manifest.num, _SAMPLES)
    for position, index in processes.claim(list(enumerate(todo))):
        start, stop = manifest.span(index)
        latents = draw_latents(stop - start, config.num_tokens, config.token_channels, manifest.seed, start)
        note = None
        if progress is not None:  # The shards before this one are drawn, or other processes are drawing them.
            num_done = num_kept + manifest.num_in(todo[:position])
            note = partial(_add_progress, progress, num_done, stop - start, manifest.num)
        samples = sample_with_strategy(flow, strategy, latents, context[start:stop], options, outputs, note)
        folder.write(index, samples)


def _add_progress(
    progress: Progress, num_done: int, num_drawn: int, num: int, done: int, total: int, what: str
) -> None:
    """Reports the progress of a shard, which is `done / total`, as a number of samples."""
    progress(num_done + num_drawn * done // total, num, _SAMPLES)


def _finish(folder: SampleFolder) -> SampleFolder:
    """Writes all checksums to the manifest, unless shards of other parts are missing."""
    with lock_folder(folder.path):
        records = [folder.record(index) for index in range(folder.manifest.num_shards)]
        if None in records:
            return folder
        folder = _with(folder, checksums=tuple(record.sha256 for record in records if record is not None))
        folder.save_manifest()
        forget_parts(folder.path)
    return folder


def _with(folder: SampleFolder, **entries: Any) -> SampleFolder:
    """Returns the folder with other entries in its manifest."""
    return replace(folder, manifest=replace(folder.manifest, **entries))


def _check_space(folder: SampleFolder, todo: Sequence[int]) -> None:
    """Raises SampleFolderError if the shards to draw do not fit on the disk."""
    bytes_per_value = 1 if folder.manifest.has_pictures else 4
    needed = folder.manifest.num_in(todo) * prod(folder.manifest.shape) * bytes_per_value
    free = shutil.disk_usage(folder.path).free
    if needed > free:
        raise SampleFolderError(
            f"{folder.path}: the samples to draw take {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free; make "
            "room, or give another folder"
        )
