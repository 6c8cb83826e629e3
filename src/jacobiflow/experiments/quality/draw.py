"""The samples of a row, each beside the exact image of its latent."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jacobiflow.baselines import SEQUENTIAL
from jacobiflow.denoising import denoise
from jacobiflow.experiments.quality.experiment import ORIGINAL, Experiment
from jacobiflow.files import write_atomically
from jacobiflow.measuring import paired_error
from jacobiflow.storage import MANIFEST, Draw, Drawn, Manifest, Processes, SampleFolder, draw_by_strategy, generate
from jacobiflow.strategy import Strategy, is_auto


def draw(
    experiment: Experiment, name: str, num: int, among: Processes = Processes(), progress: bool = True  # noqa: B008
) -> SampleFolder:  # fmt: skip
    """Draw `num` samples of a row, or as many as its folder was begun for; what it holds is not drawn again.

    The largest and the root-mean-square difference of each sample to its exact image are in the shards' records.

    **Arguments:** `among`, the processes that share the work, and `progress` as in `jacobiflow.sample_to_folder`.

    **Raises** `ValueError` where the folder was begun for more samples than there are labels for.
    """
    if name == ORIGINAL:
        return draw(experiment, SEQUENTIAL, num, among, progress)
    flow, path, strategy = experiment.flow, experiment.row_folder(name), experiment.strategy(name)
    if (path / MANIFEST).is_file():
        num = max(num, SampleFolder.open(path).manifest.num)
    labels = experiment.first_labels(num, path)
    manifest = Manifest.of(
        flow, num, labels, experiment.seed, batch_size=experiment.batch_size, shard_size=experiment.shard_size,
        model=experiment.model, strategy=name, guidance=experiment.guidance, denoise=experiment.denoise,
        certify=is_auto(name),
    )  # fmt: skip

    def drawing(folder: SampleFolder) -> Draw:
        plain = _by_peer(experiment, name) if strategy is None else _by_strategy(experiment, strategy, is_auto(name))
        return partial(_beside_exact, experiment, plain, name == SEQUENTIAL)

    return generate(
        SampleFolder(path, manifest), labels, drawing, (flow.config.num_tokens, flow.config.token_channels),
        None if strategy is None else lambda: strategy, progress=progress, among=among,
    )  # fmt: skip


def _by_strategy(experiment: Experiment, strategy: str | Strategy, certify: bool) -> Draw:
    return draw_by_strategy(
        experiment.flow, strategy, experiment.guidance, experiment.denoise, certify, experiment.batch_size
    )


def _by_peer(experiment: Experiment, name: str) -> Draw:
    flow, size, sampler = experiment.flow, experiment.batch_size, experiment.sampler(name)

    def draw(start: int, latents: Tensor, labels: Tensor | None, advance: Callable[[float], None]) -> Drawn:
        labels = None if labels is None else labels.to(flow.var.device)
        found = []
        for first in range(0, len(latents), size):
            rows = slice(first, first + size)
            found.append(sampler(latents[rows], None if labels is None else labels[rows]).images)
            advance(min(first + size, len(latents)) / len(latents))
        images = torch.cat(found)
        if experiment.denoise:
            images = denoise(flow, images, labels, experiment.denoise)
        return Drawn(images, None, torch.zeros(len(images), dtype=torch.bool), {})

    return draw


def _beside_exact(
    experiment: Experiment, plain: Draw, is_exact: bool, start: int, latents: Tensor, labels: Tensor | None,
    advance: Callable[[float], None],
) -> Drawn:  # fmt: skip
    """A shard with its error against the exact images, which are kept, not rounded to 8 bits."""
    drawn = plain(start, latents, labels, advance)
    path = experiment.exact_file(start)
    exact = None if is_exact else read_exact(path, tuple(drawn.images.shape[1:]))
    if exact is None or len(exact) < len(latents):
        sequential = _by_strategy(experiment, SEQUENTIAL, certify=False)
        exact = (drawn if is_exact else sequential(start, latents, labels, advance)).images.cpu()
        _write(path, exact)
    errors = [paired_error(*pair) for pair in zip(drawn.images.cpu(), exact[: len(latents)], strict=True)]
    return replace(drawn, figures={**drawn.figures, "errors": [(error.max, error.rms) for error in errors]})


def _write(path: Path, images: Tensor) -> None:
    data = io.BytesIO()
    np.save(data, images.numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data.getvalue())


def read_exact(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    """Exact images of `shape`; `None` where they are missing, broken or others, by a header that is checked first."""
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if not isinstance(images, np.ndarray) or images.shape[1:] != shape or images.dtype.kind != "f":
        return None
    return torch.from_numpy(np.array(images))
