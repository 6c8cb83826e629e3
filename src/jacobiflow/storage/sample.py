"""Draw many samples of a flow to a folder: sample i depends on the seed and i only."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor

from jacobiflow.calibration import Report
from jacobiflow.checks import check_choice, check_count, check_flag, check_kind, check_number, check_path, check_seed
from jacobiflow.errors import InputValueError
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.flows.labels import Labels
from jacobiflow.guidance import Guidance
from jacobiflow.latents import MOST_SAMPLES
from jacobiflow.sampling import check_settings, draw, warn_if_guidance_is_idle
from jacobiflow.solvers import Certificate
from jacobiflow.storage.figures import figures_of, outcome_of
from jacobiflow.storage.folder import SampleFolder
from jacobiflow.storage.manifest import FILES, Manifest, check_sizes
from jacobiflow.storage.processes import Processes
from jacobiflow.storage.progress import say
from jacobiflow.storage.run import Draw, Drawn, OnShard, generate
from jacobiflow.strategy import Strategy, choose, is_auto

DEFAULT_BATCH = 64
_SHARD = 1024  # samples, or about as many: what a killed process loses


def sample_to_folder(
    flow: ImageFlow,
    num: int,
    out: str | Path,
    labels: Labels | None = None,
    seed: int = 0,
    *,
    strategy: str | Path | Strategy = "auto",
    guidance: Guidance | None = None,
    denoise: float = 0.0,
    tolerance: float | None = None,
    certify: Certificate = True,
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
    """Draw `num` samples into the folder `out`, as `sample` draws them, or resume there what an earlier run began.

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
    - `report`: of `calibrate`: "auto" plans from it, other names take their guesses from it; a `Strategy` or a file
        keeps its own.
    - `overwrite`: remove what an earlier run wrote into `out` first, and nothing else.
    - `progress`: a bar on a terminal, a line every half minute elsewhere.
    - `among`: the processes that share the work, each of which calls this function; see `processes`.
    - `on_shard`: is called after every shard that this process draws, see `OnShard`.

    **Returns** the `SampleFolder`; complete in the first process. A warning says so if samples are above the tolerance,
    are NaN, or are not certified because the strategy stops after a fixed number of sweeps.

    **Raises:** `ValueError` for settings that do not fit the flow, and for more than 100,000,000 samples, 1,000,000
    shards, or 4 GiB of 8-bit images in a shard. `SampleFolderError`, a `ValueError`, where `out` holds other samples or
    files that are not ours, or its disk is too small; `FolderInUseError`, another one, where another run is writing to
    it. `OSError` where a file cannot be written; the shards before it stay.
    """
    num, seed = check_count("num", num, most=MOST_SAMPLES), check_seed(seed)
    batch_size, shard_size = sizes(num, batch_size, shard_size)
    _, denoise = check_settings(flow, batch_size, guidance, denoise, certify)
    check_path("out", out)
    check_kind("model", model, str, "a name")
    check_flag("overwrite", overwrite)
    check_flag("progress", progress)
    check_kind("among", among, Processes, "what jacobiflow.processes gives")
    check_kind("on_shard", on_shard, Callable | None, "a function, or None")
    _check(flow, num, shard_size, files)
    labels = None if labels is None else flow.check_labels(labels, num)
    warn_if_guidance_is_idle(guidance, labels)
    tolerance = None if tolerance is None else check_number("tolerance", tolerance)
    plan = partial(
        choose, flow, strategy, batch_size, tolerance=tolerance, guidance=guidance, report=report,
        say=say if Console(stderr=True).is_terminal else lambda text: None,
    )  # fmt: skip
    timed = isinstance(strategy, str) and is_auto(strategy)
    chosen = None if timed else plan()  # a plan by timings is made in the first process only
    manifest = Manifest.of(
        flow, num, labels, seed, batch_size=batch_size, shard_size=shard_size, files=files, model=model,
        strategy="a Strategy" if isinstance(strategy, Strategy) else str(strategy), guidance=guidance, denoise=denoise,
        tolerance=tolerance, certify=certify,
    )  # fmt: skip

    def drawing(folder: SampleFolder) -> Draw:
        return draw_by_strategy(flow, folder.strategy(), guidance, denoise, certify, batch_size)

    folder = generate(
        SampleFolder(Path(out), manifest), labels, drawing, (flow.config.num_tokens, flow.config.token_channels),
        lambda: plan() if chosen is None else chosen, keep_plan=timed, overwrite=overwrite, progress=progress,
        among=among, on_shard=on_shard,
    )  # fmt: skip
    if among.rank == 0 and (outcome := outcome_of(folder, flow.config.num_tokens)).has_shortfall:
        warnings.warn(str(outcome), stacklevel=2)
    return folder


def draw_by_strategy(
    flow: ImageFlow,
    strategy: str | Strategy,
    guidance: Guidance | None,
    denoise: float,
    certify: Certificate,
    batch_size: int,
) -> Draw:
    """Draws shards by `sample`."""

    plan = strategy if isinstance(strategy, Strategy) else choose(flow, strategy, batch_size, guidance=guidance)

    def draw_shard(start: int, latents: Tensor, labels: Tensor | None, advance: Callable[[float], None]) -> Drawn:
        result = draw(
            flow, plan, latents, labels, guidance=guidance, denoise=denoise, certify=certify, batch_size=batch_size,
            progress=advance,
        )  # fmt: skip
        resolved = torch.stack([block.resolved_sequentially for block in result.stats]).any(dim=0)
        return Drawn(result.images, result.certificate, resolved, figures_of(result))

    return draw_shard


def sizes(num: int, batch_size: int | None, shard_size: int | None) -> tuple[int, int]:
    """The batch size and the shard size, 64 and about 1,024 by default.

    **Raises** `TypeError` for what is no number, `ValueError` for sizes that do not go together or are over the limits.
    """
    num = check_count("num", num, most=MOST_SAMPLES)
    batch_size = min(num, DEFAULT_BATCH) if batch_size is None else batch_size
    batch_size = check_count("batch_size", batch_size, most=MOST_SAMPLES)
    shard_size = max(_SHARD // batch_size, 1) * batch_size if shard_size is None else shard_size
    shard_size = check_count("shard_size", shard_size, most=MOST_SAMPLES)
    if shard_size % batch_size:
        raise InputValueError(f"shard_size={shard_size}: give a multiple of the batch size, {batch_size}")
    check_sizes(num, shard_size, (1, 1, 1))
    return batch_size, shard_size


def _check(flow: ImageFlow, num: int, shard_size: int, files: str) -> None:
    """**Raises** `TypeError` or `ValueError` for samples that the flow, or a folder, cannot have."""
    config = flow.config
    check_sizes(num, shard_size, (config.in_channels, config.image_size, config.image_size))
    check_choice("files", files, FILES)
    if files == "png" and config.in_channels not in (1, 3):
        raise InputValueError(f"files={files!r}: holds images of 1 or 3 channels, not {config.in_channels}; give npz")
