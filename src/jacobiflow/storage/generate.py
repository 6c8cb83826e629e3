"""Draw many samples to a folder, shard by shard: sample i depends on the seed and i only."""

from __future__ import annotations

import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout
from jaxtyping import Bool, Float, Int
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from jacobiflow.calibration import Report
from jacobiflow.data import quantize
from jacobiflow.files import json_bytes, sha256, write_atomically
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.guidance import Guidance
from jacobiflow.latents import draw_latents
from jacobiflow.sampling import Samples, sample
from jacobiflow.solvers import Status
from jacobiflow.storage.folder import (
    FILES,
    IMAGES,
    MANIFEST,
    SHARDS,
    STRATEGY,
    Manifest,
    Record,
    SampleFolder,
    SampleFolderError,
    labels_sha256,
)
from jacobiflow.storage.processes import Processes
from jacobiflow.strategy import Strategy, choose

DEFAULT_BATCH = 64
_SHARD = 1024  # samples, or about so many: what a killed process loses
_LOCK = ".lock"
_QUIET = 30.0  # seconds between lines where there is no terminal
_POLL = 0.2
_SUMS = ("seconds", "denoise_seconds", "network_calls", "token_evaluations", "resolved_sequentially")
_BY_BLOCK = ("sweeps", "block_seconds")


@dataclass(frozen=True)
class Drawn:
    """A shard's images (n, C, H, W), nominally in [-1, 1], NaN where lost; and what `Record` says of them."""

    images: Float[Tensor, "n c h w"]
    certificate: Float[Tensor, " n"] | None
    resolved: Bool[Tensor, " n"]
    figures: dict[str, Any]


Draw = Callable[[int, Tensor, Tensor | None, Callable[[float], None]], Drawn]
"""Draws a shard from its first sample's index, its latents and labels; tells how far it is, from 0 to 1."""

OnShard = Callable[[int, Tensor, Tensor | None, Drawn], None]
"""Hears of a shard: its first sample's index, its latents and labels, and what was drawn."""


def sample_to_folder(
    flow: ImageFlow,
    num: int,
    out: str | Path,
    labels: Int[Tensor, " n"] | None = None,
    seed: int = 0,
    *,
    strategy: str | Path | Strategy = "auto",
    guidance: Guidance | None = None,
    denoise: float = 0.0,
    tolerance: float | None = None,
    certify: bool = True,
    batch_size: int | None = None,
    shard_size: int | None = None,
    files: Literal["npz", "png"] = "npz",
    model: str = "",
    report: Report | None = None,
    overwrite: bool = False,
    progress: bool = True,
    among: Processes = Processes(),  # noqa: B008  frozen
    on_shard: OnShard | None = None,
) -> SampleFolder:
    """Draw `num` samples into the folder `out`, as `sample` draws them, and go on where an earlier run was stopped.

    The latent of sample i depends on `seed` and i only. Samples of a shard are solved together, in batches, so that its
    bytes do not depend on how many processes there are or on interruptions; on another thread count, device or batch
    size they do, by rounding: at most one 8-bit level, for strategies to a tolerance below half of one (4e-3). A shard
    counts once its record is written; one that is missing, or does not match its checksum, is drawn again. The strategy
    is kept in the folder, so "auto" is planned once.

    **Arguments:** as `sample` takes them, and

    - `batch_size`: 64 by default, or `num` where that is less.
    - `shard_size`: samples per shard, a multiple of `batch_size`; about 1,024 by default.
    - `files`: "npz" for a file per shard with `arr_0` (n, H, W, C) and `labels`, or "png" for a file per sample, in
        folders by class.
    - `model`: a name for the manifest.
    - `report`: of `calibrate`: "auto" plans from it, other names take their guesses from it.
    - `overwrite`: remove what an earlier run wrote into `out` first.
    - `progress`: a bar on a terminal, a line every half minute elsewhere.
    - `among`: the processes that share the work, each of which calls this function; see `processes`.
    - `on_shard`: hears of every shard that this process draws.

    **Returns** the `SampleFolder`; complete in the first process.

    **Raises:** `ValueError` for settings that do not fit the flow. `SampleFolderError`, a `ValueError`, where `out`
    holds other samples, its disk is too small, or another run is writing to it. `OSError` where a file cannot be
    written; the shards before it stay.
    """
    batch_size = min(num, DEFAULT_BATCH) if batch_size is None else batch_size
    for name, value in (("num", num), ("batch_size", batch_size), ("shard_size", shard_size)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name}={value!r}: give a positive whole number")
    shard_size = max(_SHARD // batch_size, 1) * batch_size if shard_size is None else shard_size
    if shard_size % batch_size:
        raise ValueError(f"shard_size={shard_size}: give a multiple of the batch size, {batch_size}")
    config = flow.config
    if isinstance(labels, Tensor):
        flow.check_labels(labels, num)
    with warnings.catch_warnings():  # one sweep of one sample refuses what does not fit the flow
        warnings.simplefilter("ignore")
        z = draw_latents(1, config.num_tokens, config.token_channels, seed)
        first = labels[:1] if isinstance(labels, Tensor) else labels
        sample(flow, latents=z, labels=first, strategy="jacobi-1", guidance=guidance, denoise=denoise, certify=False,
               progress=False)  # fmt: skip
    if files not in FILES or (files == "png" and config.in_channels not in (1, 3)):
        raise ValueError(f"files={files!r}: give npz; or png, for images of 1 or 3 channels, not {config.in_channels}")

    def make() -> Strategy:
        say = _say if Console(stderr=True).is_terminal else _quiet
        return choose(flow, strategy, batch_size, tolerance=tolerance, guidance=guidance, report=report, say=say)

    planned = strategy == "auto"  # by timings, so in the first process only
    plan = make if planned else partial(_as_it_is, make())
    manifest = Manifest.of(
        flow, num, labels, seed, batch_size=batch_size, shard_size=shard_size, files=files, model=model,
        strategy="a Strategy" if isinstance(strategy, Strategy) else str(strategy), guidance=guidance, denoise=denoise,
        tolerance=tolerance, certify=certify,
    )  # fmt: skip

    def drawing(folder: SampleFolder) -> Draw:
        return draw_by_strategy(flow, folder.strategy(), guidance, denoise, certify, batch_size)

    shape = (config.num_tokens, config.token_channels)
    return generate(
        SampleFolder(Path(out), manifest), labels, drawing, shape, plan, planned, overwrite, progress, among,
        on_shard,
    )  # fmt: skip


def draw_by_strategy(
    flow: ImageFlow, strategy: str | Strategy, guidance: Guidance | None, denoise: float, certify: bool, batch_size: int
) -> Draw:
    """Draws shards by `sample`."""

    def draw(start: int, latents: Tensor, labels: Tensor | None, told: Callable[[float], None]) -> Drawn:
        result = sample(
            flow, latents=latents, labels=labels, strategy=strategy, guidance=guidance, denoise=denoise,
            certify=certify, batch_size=batch_size, progress=told,
        )  # fmt: skip
        resolved = torch.stack([block.resolved_sequentially for block in result.stats]).any(dim=0)
        return Drawn(result.images, result.certificate, resolved, figures_of(result))

    return draw


def figures_of(result: Samples) -> dict[str, Any]:
    """What samples cost and how they ended, as JSON values that `total` adds up."""
    status = result.status
    return {
        "seconds": result.seconds,
        "denoise_seconds": result.denoise_seconds,
        "network_calls": result.network_calls,
        "token_evaluations": result.token_evaluations,
        "resolved_sequentially": result.resolved_sequentially,
        "status": {state.name.lower(): int((status == state).sum()) for state in Status},
        "sweeps": [block.sweeps for block in result.stats],
        "block_seconds": [block.seconds for block in result.stats],
        "threads": torch.get_num_threads(),
    }


def total(shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The sum of what `figures_of` gives of several shards; seconds are those of all processes together."""
    status = sum((Counter(each["status"]) for each in shards), Counter())
    return {
        **{name: sum(each[name] for each in shards) for name in _SUMS},
        "status": {state.name.lower(): status[state.name.lower()] for state in Status},
        **{name: [sum(column) for column in zip(*(each[name] for each in shards), strict=True)] for name in _BY_BLOCK},
    }


def generate(
    folder: SampleFolder,
    labels: Int[Tensor, " n"] | None,
    drawing: Callable[[SampleFolder], Draw],
    latent_shape: tuple[int, int],
    plan: Callable[[], Strategy] | None = None,
    planned: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    among: Processes = Processes(),  # noqa: B008
    on_shard: OnShard | None = None,
) -> SampleFolder:
    """Draw the shards of `folder` that are not there yet, this process its share; see `sample_to_folder`.

    **Arguments:** `folder`, its manifest without checksums; `drawing` gives what draws a shard, once the folder is
    ready; `latent_shape` (T, C); `plan` makes the strategy to keep in the folder, not asked again where an earlier run
    kept one and it is `planned` (by timings, which differ from run to run); the rest as in `sample_to_folder`.
    """
    with _locked(folder.path, among) as lock:
        folder, todo = among.once(lambda: _begin(folder, labels, plan, planned, overwrite, lock, progress))
        if not (folder.path / MANIFEST).is_file():
            raise SampleFolderError(
                f"{folder.path}: process {among.rank} does not see it; give a folder on a shared disk"
            )
        draw, spans = drawing(folder), folder.manifest.spans()
        mine = todo[among.rank :: among.count]
        with _progress(folder, todo, progress and among.rank == 0) as told:
            for index in mine:
                start, stop = spans[index]
                latents = draw_latents(stop - start, *latent_shape, folder.manifest.seed, start)
                classes = None if labels is None else labels[start:stop]
                drawn = draw(start, latents, classes, partial(_tell, told, stop - start))
                _write(folder, index, drawn, classes)
                told(0)
                if on_shard is not None:
                    on_shard(start, latents, classes, drawn)
            if among.rank == 0:
                _wait(folder, todo, told)
                folder = replace(
                    folder.with_checksums(), drawn=sum(stop - start for start, stop in map(spans.__getitem__, todo))
                )
                folder.save_manifest()
    return folder


def _tell(told: Callable[[float], None], size: int, share: float) -> None:
    told(share * size)


def _write(folder: SampleFolder, index: int, drawn: Drawn, labels: Tensor | None) -> None:
    lost = ~torch.isfinite(drawn.images).flatten(1).all(dim=1)
    record = Record(
        start=folder.manifest.spans()[index][0], num=len(drawn.images), sha256="",
        labels=None if labels is None else tuple(labels.tolist()),
        certificate=None if drawn.certificate is None else tuple(drawn.certificate.tolist()),
        resolved=tuple(drawn.resolved.nonzero().flatten().tolist()), lost=tuple(lost.nonzero().flatten().tolist()),
        figures=drawn.figures,
    )  # fmt: skip
    try:
        folder.write(index, quantize(drawn.images.masked_fill(lost.view(-1, 1, 1, 1), -1.0)), record)
    except OSError as error:
        raise OSError(
            f"{error.filename or folder.path}: {error.strerror}; the finished shards are kept: make room, or give "
            "another disk, and the same command again goes on"
        ) from error


def _begin(
    folder: SampleFolder, labels: Tensor | None, plan: Callable[[], Strategy] | None, planned: bool, overwrite: bool,
    lock: FileLock, progress: bool,
) -> tuple[SampleFolder, list[int]]:  # fmt: skip
    """The folder as it goes on, and the shards that it lacks; in the first process only."""
    path, manifest = folder.path, folder.manifest
    path.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise SampleFolderError(
            f"{path}: another run is writing to it; wait for it, stop it, or give another --out"
        ) from error
    begun = (path / MANIFEST).exists()
    for name in () if begun else (SHARDS, IMAGES, STRATEGY):
        if (path / name).exists():
            raise SampleFolderError(f"{path}: has {name} but no {MANIFEST}; give another --out, or remove it")
    # A run that was killed before its first shard has left nothing to go on with.
    drawn = begun and any((path / SHARDS).glob("*.json"))
    earlier = SampleFolder.open(path).manifest if drawn and not overwrite else None
    if earlier is not None and planned and earlier.strategy == manifest.strategy:
        kept, digest = b"", earlier.strategy_sha256
    else:
        kept = b"" if plan is None else json_bytes(plan().to_json())
        digest = sha256(kept) if kept else None
    manifest, now = replace(manifest, strategy_sha256=digest), manifest.machine
    if earlier is not None:
        earlier.check_same_run(manifest, path)
        if labels_sha256(None if labels is None else labels[: earlier.num]) != earlier.labels_sha256:
            raise SampleFolderError(f"{path}: holds samples of other labels; give another --out, or --overwrite")
        if digest is not None and _digest(path / STRATEGY) != digest:
            raise SampleFolderError(f"{path / STRATEGY}: not as its run left it; restore it, or --overwrite")
        manifest = replace(manifest, machine=earlier.machine)
    folder, shards = replace(folder, manifest=manifest), range(len(manifest.spans()))
    todo = list(shards) if earlier is None else [index for index in shards if not folder.verify(index)]
    last = None if earlier is None else earlier.num // earlier.shard_size  # a shard that is not full may grow
    grows = earlier is not None and earlier.num < manifest.num
    spoilt = [index for index in todo if folder.has(index) and not (grows and index == last)]
    if earlier is not None and spoilt:
        warnings.warn(
            f"{path}: {len(spoilt)} of {len(shards)} shards lack their images or do not match their checksums, "
            f"{spoilt[0]:05} for one; drawn again",
            stacklevel=2,
        )
    if earlier is not None and todo:
        then, here = (f"{m.get('device')} with {m.get('threads')} threads" for m in (earlier.machine, now))
        if then != here:
            warnings.warn(
                f"{path}: begun on {then}, goes on on {here}: equal to rounding, not to the bit", stacklevel=2
            )
    _check_room(folder, todo, folder.size() if begun and overwrite else 0)
    # Nothing was changed so far.
    if begun and overwrite:
        folder.clear()
    folder.sweep()
    for index in todo:
        folder.remove(index)
    folder.save_manifest()
    if kept and earlier is None:
        write_atomically(path / STRATEGY, kept)
    if earlier is not None and progress and todo:
        _say(f"{path}: goes on, with {len(todo)} of {len(shards)} shards to draw")
    return folder, todo


def _digest(path: Path) -> str:
    return sha256(path.read_bytes()) if path.is_file() else ""


def _check_room(folder: SampleFolder, todo: Sequence[int], freed: int) -> None:
    """**Raises** `SampleFolderError` where the missing shards would not fit the disk."""
    spans, (c, h, w) = folder.manifest.spans(), folder.manifest.image_shape
    need = sum(stop - start for start, stop in (spans[i] for i in todo)) * c * h * w
    free = shutil.disk_usage(folder.path).free + freed
    if need > free:
        raise SampleFolderError(
            f"{folder.path}: the samples to draw take {need / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free; make room, "
            "or give another --out"
        )


def _wait(folder: SampleFolder, todo: Sequence[int], told: Callable[[float], None]) -> None:
    """Wait for the shards of the other processes. torchrun stops this one where one of them fails."""
    missing = set(todo)
    while missing := {index for index in missing if not folder.has(index)}:
        told(0)
        time.sleep(_POLL)


@contextmanager
def _locked(path: Path, among: Processes) -> Iterator[FileLock]:
    """A lock for the first process to take, let go at the end, and by the system where the process is killed.

    A new folder is taken away again where the run is refused.
    """
    new = [place for place in (path, *path.parents) if not place.exists()]
    lock = FileLock(path / _LOCK)
    try:
        yield lock
    except ValueError:
        if lock.is_locked and not (path / MANIFEST).exists():
            (path / _LOCK).unlink(missing_ok=True)
        if among.rank == 0:
            with suppress(OSError):  # not empty
                for place in new:
                    place.rmdir()
        raise
    finally:
        lock.release()


@contextmanager
def _progress(folder: SampleFolder, todo: Sequence[int], shown: bool) -> Iterator[Callable[[float], None]]:
    """What to tell how many samples of the shard at hand are done; shows those of all processes."""
    if not shown or not todo:
        yield lambda _: None
        return
    spans = folder.manifest.spans()
    num = sum(stop - start for start, stop in (spans[i] for i in todo))
    console = Console(stderr=True)
    missing, done, resolved = set(todo), 0, 0
    began = said = time.perf_counter()
    columns = (BarColumn(20), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=num)

        def told(samples: float) -> None:
            nonlocal done, resolved, said
            for index in [i for i in missing if folder.has(i)]:
                record = folder.record(index)
                if record is not None:
                    missing.discard(index)
                    done, resolved = done + record.num, resolved + len(record.resolved)
            now = time.perf_counter()
            count = min(done + int(samples), num)
            share = f"{resolved / done:.2%} re-solved" if done else "none finished yet"
            text = f"{count:,} of {num:,} samples, {count / max(now - began, 1e-9):.1f} a second, {share}"
            bar.update(task, completed=count, description=text)
            if not console.is_terminal and now - said > _QUIET:
                said = now
                _say(text)

        yield told


def _as_it_is(strategy: Strategy) -> Strategy:
    return strategy


def _quiet(text: str) -> None:
    pass


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
