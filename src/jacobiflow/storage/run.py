"""A run: each process draws its share of the shards that a folder lacks."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jacobiflow.data import quantize
from jacobiflow.latents import draw_latents
from jacobiflow.locking import locking
from jacobiflow.storage.begin import Begun, begin, has_begun
from jacobiflow.storage.folder import SampleFolder
from jacobiflow.storage.manifest import SampleFolderError
from jacobiflow.storage.names import MANIFEST
from jacobiflow.storage.processes import Processes
from jacobiflow.storage.progress import run_progress, say
from jacobiflow.storage.record import Record
from jacobiflow.strategy import Strategy

_POLL = 0.2  # seconds


@dataclass(frozen=True)
class Drawn:
    """A shard's images (n, C, H, W), nominally in [-1, 1], NaN where lost; and what `Record` says of them."""

    images: Float[Tensor, "n c h w"]
    certificate: Float[Tensor, " n"] | None
    resolved: Bool[Tensor, " n"]
    figures: dict[str, Any]


Draw = Callable[[int, Tensor, Tensor | None, Callable[[float], None]], Drawn]
"""Draws a shard: given its first sample's index, latents and labels, and what to call with the share that is done."""

OnShard = Callable[[int, Tensor, Tensor | None, Drawn], None]
"""Called after a shard was drawn, with its first sample's index, its latents and labels, and the result."""


def generate(
    requested: SampleFolder,
    labels: Int[Tensor, " n"] | None,
    drawing: Callable[[SampleFolder], Draw],
    latent_shape: tuple[int, int],
    plan: Callable[[], Strategy] | None = None,
    *,
    keep_plan: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    among: Processes = Processes(),  # noqa: B008  frozen
    on_shard: OnShard | None = None,
) -> SampleFolder:
    """Draw the shards that a folder lacks, each process its share; see `jacobiflow.sample_to_folder`.

    **Arguments:**

    - `requested`: the folder, and the manifest of what to draw, without checksums.
    - `drawing`: makes the `Draw` that draws all shards, once the folder is ready.
    - `latent_shape`: (T, C).
    - `plan`: makes the strategy to keep in the folder, `None` where the sampler is not a strategy.
    - `keep_plan`: resume with the strategy in the folder, without calling `plan`: for plans by timings, which differ
        from run to run.
    - `overwrite`, `progress`, `among`, `on_shard`: as in `sample_to_folder`.
    """
    with locking(requested.path) as acquire:

        def start() -> Begun:
            acquire()
            return begin(requested, labels, plan, keep_plan, overwrite)

        begun = among.once(start)
        folder, todo = begun.folder, begun.todo
        if not (folder.path / MANIFEST).is_file():
            raise SampleFolderError(
                f"{folder.path}: process {among.rank} does not see it; give a folder on a shared disk"
            )
        first = among.rank == 0
        shown = progress and first
        if begun.resumed and todo and shown:
            say(f"{folder.path}: resumed, {len(todo)} of {folder.manifest.num_shards} shards to draw")
        with (
            _withdrawn_if_nothing_is_drawn(begun, among),
            run_progress(folder, todo, shown, processes=among.count) as update,
        ):
            draw = drawing(folder)
            for index in todo[among.rank :: among.count]:
                _draw_shard(folder, index, labels, draw, latent_shape, update, on_shard)
            if first:
                _wait(folder, todo, update)
        if first:
            folder = replace(folder.with_checksums(), drawn=folder.manifest.num_in(todo))
            folder.save_manifest()
    return folder


@contextmanager
def _withdrawn_if_nothing_is_drawn(begun: Begun, among: Processes) -> Iterator[None]:
    """Where an error ends a new run before its first shard, remove what it wrote: there is nothing to resume."""
    try:
        yield
    except BaseException:
        if among.count == 1 and not begun.resumed and not has_begun(begun.folder):
            begun.folder.clear()
        raise


def _draw_shard(
    folder: SampleFolder, index: int, labels: Tensor | None, draw: Draw, latent_shape: tuple[int, int],
    update: Callable[[float], None], on_shard: OnShard | None,
) -> None:  # fmt: skip
    start, stop = folder.manifest.span(index)
    latents = draw_latents(stop - start, *latent_shape, folder.manifest.seed, start)
    classes = None if labels is None else labels[start:stop]
    drawn = draw(start, latents, classes, lambda share: update(share * (stop - start)))
    _write(folder, index, drawn, classes)
    update(0)
    if on_shard is not None:
        on_shard(start, latents, classes, drawn)


def _write(folder: SampleFolder, index: int, drawn: Drawn, labels: Tensor | None) -> None:
    """Write a shard, its lost samples black."""
    lost = ~torch.isfinite(drawn.images).flatten(1).all(dim=1)
    record = Record(
        start=folder.manifest.span(index)[0], num=len(drawn.images), sha256="",
        labels=None if labels is None else tuple(labels.tolist()),
        certificate=None if drawn.certificate is None else tuple(drawn.certificate.tolist()),
        resolved=tuple(drawn.resolved.nonzero().flatten().tolist()), lost=tuple(lost.nonzero().flatten().tolist()),
        figures=drawn.figures,
    )  # fmt: skip
    try:
        folder.write(index, quantize(drawn.images.masked_fill(lost.view(-1, 1, 1, 1), -1.0)), record)
    except OSError as error:
        remedy = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "correct this"
        raise OSError(
            f"{error.filename or folder.path}: {error.strerror}; the finished shards are kept: {remedy}, then sample "
            "into the folder again with the same settings"
        ) from error


def _wait(folder: SampleFolder, todo: Sequence[int], update: Callable[[float], None]) -> None:
    """Wait for the shards of the other processes. torchrun stops this one where one of them fails."""
    for index in todo:
        while not folder.has(index):
            update(0)
            time.sleep(_POLL)
