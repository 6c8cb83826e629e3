"""Many samples of a flow in a folder: sample i depends on the seed and i only."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from jacobiflow.calibration import Report
from jacobiflow.checks import check_choice, check_count, check_flag, check_kind, check_number, check_path, check_seed
from jacobiflow.denoising import check_rate
from jacobiflow.errors import InputValueError
from jacobiflow.flows.fingerprint import fingerprint
from jacobiflow.flows.image_flow import ImageFlow, check_flow, precision, state_dtype
from jacobiflow.flows.labels import Labels
from jacobiflow.latents import MOST_SAMPLES
from jacobiflow.measuring import machine
from jacobiflow.progress import Progress
from jacobiflow.sampling import Samples, draw, warn_if_guidance_is_idle
from jacobiflow.solvers import Certificate, check_certificate
from jacobiflow.storage.folder import SampleFolder, pillow
from jacobiflow.storage.manifest import Files, Manifest, labels_sha256
from jacobiflow.storage.processes import Processes
from jacobiflow.storage.run import OnShard, Run
from jacobiflow.strategy import Strategy, choose, is_auto

_BATCH = 64
_SHARD = 1024  # samples, or about as many: what a killed process loses


def sample_to_folder(
    flow: ImageFlow,
    num: int,
    out: str | Path,
    labels: Labels | None = None,
    seed: int = 0,
    *,
    strategy: str | Path | Strategy = "auto",
    denoise: float = 0.0,
    tolerance: float | None = None,
    certify: Certificate = True,
    batch_size: int | None = None,
    shard_size: int | None = None,
    files: Files = "npz",
    model: str = "",
    report: Report | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    processes: Processes = Processes(),  # noqa: B008  frozen
    on_shard: OnShard | None = None,
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
        files: "npz" for a file per shard with `arr_0` (n, H, W, C) and `labels`, or "png" for a file per sample, in
            folders by class.
        model: A name for the manifest.
        report: Of `calibrate`: "auto" plans from it, other names take their guesses from it.
        overwrite: Remove the samples of an earlier run first.
        processes: The processes that share the work, each of which calls this function; see `jacobiflow.processes`.
        on_shard: A function that is called after every shard that this process draws, see `OnShard`.

    Returns:
        The folder; complete in the first process. A warning says if samples are above the tolerance, are NaN, or are
        not certified because the strategy stops after a fixed number of sweeps.

    Raises:
        ValueError: If settings do not fit the flow, or its samples are not images; as SampleFolderError if `out` has
            other files or samples, or its disk is too small, and as FolderInUseError if another run is writing to it.
        OSError: If a file cannot be written; the shards before it stay.

    Example:
        >>> import tempfile, jacobiflow as jf
        >>> out = tempfile.mkdtemp()
        >>> folder = jf.sample_to_folder(jf.load("digits-maf"), 8, out, batch_size=4, shard_size=4)
        >>> folder.manifest.num_shards, folder.drawn
        (2, 8)
        >>> jf.sample_to_folder(jf.load("digits-maf"), 8, out, batch_size=4, shard_size=4).drawn
        0
    """
    num, seed = check_count("num", num, most=MOST_SAMPLES), check_seed(seed)
    batch_size, shard_size = sizes(num, batch_size, shard_size)
    check_flow(flow)
    denoise = check_rate(flow, denoise)
    check_certificate("certify", certify)
    check_path("out", out)
    check_kind("model", model, str, "a name")
    check_flag("overwrite", overwrite)
    check_kind("processes", processes, Processes, "the value of jacobiflow.processes")
    for name, value in (("progress", progress or None), ("on_shard", on_shard)):
        if value is not None and not callable(value):
            check_kind(name, value, type(None), "a function, or None")
    check_choice("files", files, get_args(Files))
    _check_images(flow, files)
    labels = None if labels is None else flow.check_labels(labels, num)
    warn_if_guidance_is_idle(flow, labels)
    tolerance = None if tolerance is None else check_number("tolerance", tolerance)
    plan = partial(choose, flow, strategy, batch_size, tolerance=tolerance, report=report)
    is_timed = isinstance(strategy, str) and is_auto(strategy)
    fixed_plan = None if is_timed else plan()  # a plan by timings is made in the first process only
    name = "a Strategy" if isinstance(strategy, Strategy) else str(strategy)
    config = flow.config
    manifest = Manifest(
        num=num, image_shape=(config.in_channels, config.image_size, config.image_size), seed=seed,
        labels_sha256=labels_sha256(labels), num_classes=config.num_classes, batch_size=batch_size,
        shard_size=shard_size, files=files, model=model, fingerprint=fingerprint(flow), dtype=precision(flow),
        strategy=name, strategy_sha256="", guidance=flow.guidance, denoise=float(denoise), tolerance=tolerance,
        certify=certify, machine=machine(flow.var.device),
    )  # fmt: skip

    def draw_shard(latents: Tensor, classes: Tensor | None, plan: Strategy, note: Progress | None) -> Samples:
        return draw(
            flow, plan, latents, classes, denoise=denoise, certify=certify, batch_size=batch_size, progress=note
        )

    folder = Run(
        folder=SampleFolder(Path(out), manifest), labels=labels,
        latent_shape=(config.num_tokens, config.token_channels), draw=draw_shard,
        plan=lambda: plan() if fixed_plan is None else fixed_plan, keep_plan=is_timed, overwrite=overwrite,
        processes=processes, on_shard=on_shard, progress=progress or None,
    ).complete()  # fmt: skip
    if processes.rank == 0 and (outcome := folder.outcome(config.num_tokens)).has_shortfall:
        warnings.warn(str(outcome), stacklevel=2)
    return folder


def sizes(num: int, batch_size: int | None, shard_size: int | None) -> tuple[int, int]:
    """Returns the batch size and the shard size, 64 and about 1,024 by default."""
    num = check_count("num", num, most=MOST_SAMPLES)
    batch_size = min(num, _BATCH) if batch_size is None else batch_size
    batch_size = check_count("batch_size", batch_size, most=MOST_SAMPLES)
    shard_size = max(_SHARD // batch_size, 1) * batch_size if shard_size is None else shard_size
    shard_size = check_count("shard_size", shard_size, most=MOST_SAMPLES)
    if shard_size % batch_size:
        raise InputValueError(f"shard_size={shard_size}: give a multiple of the batch size, {batch_size}")
    return batch_size, shard_size


def _check_images(flow: ImageFlow, files: str) -> None:
    """Raises ValueError if the flow's samples cannot be stored as 8-bit images."""
    config = flow.config
    tokens: Any = torch.zeros(1, config.num_tokens, config.token_channels, device=flow.var.device)
    shape = tuple(flow.to_images(tokens.to(state_dtype(flow))).shape[1:])
    if shape != (config.in_channels, config.image_size, config.image_size):
        raise InputValueError(
            f"samples of shape {shape} are not images of the flow's config, and would be stored as 8-bit images; draw "
            "them with jacobiflow.sample"
        )
    if files == "png":
        pillow()
        if config.in_channels not in (1, 3):
            raise InputValueError(
                f"files={files!r}: holds images of 1 or 3 channels, not {config.in_channels}; give npz"
            )
