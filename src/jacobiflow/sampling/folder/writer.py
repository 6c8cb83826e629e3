"""Many samples of a flow in a folder, drawn by one process or several: sample i depends on the seed and i only."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from math import prod
from os import environ
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
import torch.distributed as dist

from jacobiflow.blocks.context import Context
from jacobiflow.calibration import CalibrationReport
from jacobiflow.errors import InputValueError, first_line
from jacobiflow.fixed_point import CertifyMode
from jacobiflow.fixed_point.options import SolveOptions
from jacobiflow.models.checkpoints.fingerprint import fingerprint
from jacobiflow.models.flow import Flow, check_flow
from jacobiflow.models.labels import ContextLike, Labels
from jacobiflow.models.latents import MAX_SAMPLES, draw_latents
from jacobiflow.planner import Strategy, choose, is_auto
from jacobiflow.sampling.folder.manifest import Files, Manifest, SampleFolderError, context_sha256
from jacobiflow.sampling.folder.reader import STRATEGY, SampleFolder, pillow
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
from jacobiflow.utils.files import MANIFEST, check_own, json_bytes, locked, sha256, write_atomically
from jacobiflow.utils.progress import Progress
from jacobiflow.utils.timing import machine

_BATCH = 64
_SHARD = 1024  # samples, or about as many: what a killed process loses
_POLL = 0.2  # seconds
_SAMPLES = "samples"  # what progress counts
_WAIT = timedelta(hours=12)  # for the first process, which may have a strategy to plan and many checksums to compute

T = TypeVar("T")


class FirstProcessFailed(InputValueError):  # noqa: N818  names the process at fault
    """The first process raised an error with this message, which it shows itself."""


@dataclass(frozen=True)
class Processes:
    """This process, number `rank` of `count`; `local_rank` is its number on its machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    def run_on_rank_zero(self, work: Callable[[], T]) -> T:
        """Calls `work` in the first process; returns its result in all of them, or raises FirstProcessFailed."""
        if self.count == 1:
            return work()
        answer: list[Any] = [None, None]  # the result, and the message of an error
        if self.rank == 0:
            try:
                answer[0] = work()
            except Exception as error:
                dist.broadcast_object_list([None, str(error) or type(error).__name__], src=0)
                raise
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise FirstProcessFailed(answer[1])
        return answer[0]

    def device(self, name: str) -> str:
        """Returns the device for this process: "cuda" is the GPU of its local rank, of those that it sees."""
        if name != "cuda" or self.count == 1 or not torch.cuda.is_available():
            return name
        index = self.local_rank % torch.cuda.device_count()  # a launcher may show each process one GPU only
        torch.cuda.set_device(index)  # else every process would also hold memory of the first GPU
        return f"cuda:{index}"


@contextmanager
def processes() -> Iterator[Processes]:
    """Connects the processes that `torchrun` started, for `sample_to_folder`; without it, this process is alone.

    `processes.device("cuda")` is the GPU of this process.

    Example:
        >>> import jacobiflow as jf
        >>> with jf.processes() as processes:
        ...     processes.rank, processes.count
        (0, 1)
    """
    if not dist.is_torchelastic_launched():
        yield Processes()
        return
    try:
        local_rank = int(environ["LOCAL_RANK"])
        dist.init_process_group("gloo", timeout=_WAIT)
    except (KeyError, ValueError, dist.DistError) as error:
        raise InputValueError(
            f"torchrun's variables are incomplete or wrong ({first_line(error)}); start the processes by torchrun, "
            "or unset TORCHELASTIC_RUN_ID for one process"
        ) from error
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), local_rank)
    finally:
        dist.destroy_process_group()


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
    processes: Processes = Processes(),
) -> SampleFolder:
    """Draws samples into a folder as `sample` draws them, or resumes a run that was stopped.

    The latent of sample i depends on `seed` and i only. A shard has the same bytes whatever the number of processes and
    interruptions. On another thread count, device or batch size it differs by rounding: at most one 8-bit level, for
    strategies to a tolerance below half of one (4e-3). A shard counts once its record is written; one that is missing,
    or does not match its checksum, is drawn again. The strategy is stored in the folder, so "auto" is planned once.

    Args:
        flow: As `sample` takes it, under guidance or not; so are the arguments that are not listed here.
        num: The number of samples.
        out: A folder that is new, empty or has samples of the same settings.
        batch_size: 64 by default, or `num` if that is less.
        shard_size: Samples per shard, a multiple of `batch_size`; about 1,024 by default.
        files: "png" for a PNG per sample too, in folders by class.
        model: A name for the manifest.
        report: Of `calibrate`: "auto" plans from it, other names take their guesses from it.
        overwrite: Remove the samples of an earlier run first.
        processes: The processes that share the work, each of which calls this function; see `jacobiflow.processes`.

    Returns:
        The folder; complete in the first process. A warning says so if samples are lost, are not certified, or
        are sensitive to rounding.

    Raises:
        SampleFolderError: If `out` has other samples, or its disk is too small.
        FolderInUseError: If another run is writing to it.

    Example:
        >>> import tempfile, jacobiflow as jf
        >>> out = tempfile.mkdtemp()
        >>> folder = jf.sample_to_folder(jf.load("digits-maf"), 8, out, batch_size=4, shard_size=4)
        >>> folder.manifest.num_shards, folder.drawn
        (2, 8)
        >>> jf.sample_to_folder(jf.load("digits-maf"), 8, out, batch_size=4, shard_size=4).drawn
        0
    """
    num, seed = check_count("num", num, most=MAX_SAMPLES), check_seed(seed)
    batch_size, shard_size = _sizes(num, batch_size, shard_size)
    check_flow(flow)
    check_path("out", out)
    check_kind("model", model, str, "a name")
    check_flag("overwrite", overwrite)
    check_flag("sensitivity", sensitivity)
    check_kind("progress", progress, Callable | None, "a function of done, total and what, or None")
    check_kind("processes", processes, Processes, "what `with jacobiflow.processes()` gives")
    tolerance = SolveOptions(tolerance, certify).tolerance
    config = flow.config
    if check_choice("files", files, get_args(Files)) == "png":
        pillow()
        if flow.image_shape is None:
            raise InputValueError("files='png': for flows over images; give 'npz'")
        check_choice("files='png': in_channels", flow.image_shape[0], (1, 3))
    checked = flow.check_one_context(labels, context, num)
    flow, denoise = resolve_settings(flow, settings, checked)
    log_prob = check_log_prob(flow, log_prob, denoise)
    warn_if_guidance_is_idle(flow, checked)
    manifest = Manifest(
        num=num, shape=flow.image_shape or (config.num_tokens, config.token_channels), num_tokens=config.num_tokens,
        seed=seed, context_sha256=context_sha256(checked), num_classes=config.num_classes, batch_size=batch_size,
        shard_size=shard_size, files=files, model=model, fingerprint=fingerprint(flow), dtype=flow.precision,
        strategy="a Strategy" if isinstance(strategy, Strategy) else str(strategy), strategy_sha256="",
        guidance=flow.guidance, denoise=float(denoise), tolerance=tolerance, certify=certify,
        log_prob=log_prob, sensitivity=sensitivity, machine=machine(flow.var.device),
    )  # fmt: skip
    new = SampleFolder(Path(out), manifest)
    plan = partial(choose, flow, strategy, batch_size, tolerance=tolerance, report=report)
    is_timed = isinstance(strategy, str) and is_auto(strategy)  # plans by timings differ, so the first one stays
    with ExitStack() as stack:

        def start() -> tuple[SampleFolder, list[int]]:
            check_own(new.path, manifest.kind)  # before there is a lock in it
            new.check_no_links()
            stack.enter_context(locked(new.path))
            earlier = SampleFolder.open(new.path) if (new.path / MANIFEST).exists() else None
            if earlier is None or overwrite or not any(map(earlier.record, range(earlier.manifest.num_shards))):
                return _begin(new, earlier, plan(), overwrite)
            return _resume(new, earlier, checked, None if is_timed else plan())

        folder, todo = processes.run_on_rank_zero(start)
        if not (folder.path / MANIFEST).exists():
            raise SampleFolderError(
                f"{folder.path}: process {processes.rank} does not see it; give one on a shared disk"
            )
        _draw_shards(flow, folder, todo, checked, processes, progress)
        folder = replace(folder, drawn=folder.manifest.num_in(todo))
        if processes.rank > 0:
            return folder
        for index in todo:
            while folder.record(index) is None:  # another process draws it; torchrun stops this one if that one fails
                time.sleep(_POLL)
        folder = _with(folder, checksums=tuple(record.sha256 for record in folder.records()))
        folder.save_manifest()
    outcome = folder.outcome()
    if outcome.has_shortfall:
        warnings.warn(str(outcome), stacklevel=2)
    return folder


def _sizes(num: int, batch_size: int | None, shard_size: int | None) -> tuple[int, int]:
    """Returns the batch size and the shard size, 64 and about 1,024 by default."""
    batch_size = min(num, _BATCH) if batch_size is None else batch_size
    batch_size = check_count("batch_size", batch_size, most=MAX_SAMPLES)
    shard_size = max(_SHARD // batch_size, 1) * batch_size if shard_size is None else shard_size
    shard_size = check_count("shard_size", shard_size, most=MAX_SAMPLES)
    if shard_size % batch_size:
        raise InputValueError(f"shard_size={shard_size}: give a multiple of the batch size, {batch_size}")
    return batch_size, shard_size


# Both raise an error before they change anything.
def _begin(
    new: SampleFolder, earlier: SampleFolder | None, plan: Strategy, overwrite: bool
) -> tuple[SampleFolder, list[int]]:
    """Starts a run, in place of an earlier one; returns its folder, and the shards to draw."""
    strategy = json_bytes(plan.to_json())
    folder = _with(new, strategy_sha256=sha256(strategy))
    todo = list(range(folder.manifest.num_shards))
    if not overwrite:
        _check_space(folder, todo)
    if earlier is not None:
        earlier.clear()
    folder.remove_partials()
    folder.save_manifest()
    write_atomically(folder.path / STRATEGY, strategy)
    return folder, todo


def _resume(
    new: SampleFolder, earlier: SampleFolder, context: Context, plan: Strategy | None
) -> tuple[SampleFolder, list[int]]:
    """Goes on with an earlier run of the same settings, maybe of fewer samples."""
    previous = earlier.manifest
    settings = replace(
        new.manifest,
        context_sha256=context_sha256(context[: previous.num]),
        strategy_sha256=previous.strategy_sha256 if plan is None else sha256(json_bytes(plan.to_json())),
    )
    previous.check_resumes(settings, new.path)
    earlier.strategy()  # refuses a file that was changed
    folder = _with(
        new, strategy_sha256=previous.strategy_sha256, machine=previous.machine, checksums=previous.checksums
    )
    todo = [index for index in range(folder.manifest.num_shards) if not folder.verify(index)]
    if todo:
        if damaged := [index for index in todo if folder.record(index) is not None]:
            warnings.warn(f"{new.path}: shards {format_value(damaged)} were damaged, and are drawn again", stacklevel=2)
        if previous.machine != new.manifest.machine:
            message = "begun on another machine or by other versions: equal to rounding, not to the bit"
            warnings.warn(f"{new.path}: {message}", stacklevel=2)
        _check_space(folder, todo)
        folder = _with(folder, checksums=None)
        folder.save_manifest()
    folder.remove_partials()
    for index in todo:
        folder.remove_record(index)
    return folder, todo


@torch.no_grad()
def _draw_shards(
    flow: Flow, folder: SampleFolder, todo: Sequence[int], context: Context,
    processes: Processes, progress: Progress | None,
) -> None:  # fmt: skip
    """Draws the share of this process."""
    manifest, config, strategy = folder.manifest, flow.config, folder.strategy()
    options = SolveOptions(certify=manifest.certify, batch_size=manifest.batch_size)
    outputs = Outputs(manifest.denoise, manifest.log_prob, manifest.sensitivity)
    num_present = manifest.num - manifest.num_in(todo)
    if progress is not None and todo:
        progress(num_present, manifest.num, _SAMPLES)
    for index in todo[processes.rank :: processes.count]:
        start, stop = manifest.span(index)
        num_drawn = (stop - start) * processes.count  # the other processes draw a shard each in this time
        latents = draw_latents(stop - start, config.num_tokens, config.token_channels, manifest.seed, start)
        note = None if progress is None else partial(_note, progress, num_present, num_drawn, manifest.num)
        samples = sample_with_strategy(flow, strategy, latents, context[start:stop], options, outputs, note)
        folder.write(index, samples)
        num_present += num_drawn


def _note(progress: Progress, num_present: int, num_drawn: int, num: int, done: int, total: int, what: str) -> None:
    progress(min(num_present + num_drawn * done // total, num), num, _SAMPLES)


def _with(folder: SampleFolder, **entries: Any) -> SampleFolder:
    """Returns the folder with other entries in its manifest."""
    return replace(folder, manifest=replace(folder.manifest, **entries))


def _check_space(folder: SampleFolder, todo: Sequence[int]) -> None:
    """Raises SampleFolderError if the missing shards do not fit on the disk."""
    is_image = len(folder.manifest.shape) == 3
    need = folder.manifest.num_in(todo) * prod(folder.manifest.shape) * (1 if is_image else 4)  # bytes a value
    free = shutil.disk_usage(folder.path).free
    if need > free:
        raise SampleFolderError(
            f"{folder.path}: the samples to draw take {need / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free; make room, "
            "or give another folder"
        )
