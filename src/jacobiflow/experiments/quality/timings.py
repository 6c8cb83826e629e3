"""Seconds of a batch of every row, all rows in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from jacobiflow.baselines import SEQUENTIAL
from jacobiflow.denoising import denoise
from jacobiflow.experiments.quality.experiment import ORIGINAL, Experiment
from jacobiflow.experiments.quality.folder import KEYS, TIMINGS
from jacobiflow.files import check_ours, read_object, write_json
from jacobiflow.latents import draw_latents
from jacobiflow.measuring import interleave, machine, paired_error
from jacobiflow.storage import labels_sha256


def timings(experiment: Experiment, repeats: int, after_each: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Time the first batch of every row, and of the original loop and the sequential one; kept in the folder.

    Rows are timed anew where one has not been, or was on another machine: a comparison is of one run.

    **Arguments:** `repeats`, rounds that count; `after_each` is called with a row's name, see `interleave`.

    **Returns** a JSON value: `rows`, by name a `Timing` without denoising and the largest `error` against the
    sequential loop; `denoise_seconds` of a batch, a median, which all rows have in common; and what they were measured
    on.
    """
    flow, path, labels = experiment.flow, experiment.out / TIMINGS, _labels(experiment)
    device, config = flow.var.device, flow.config
    here = {"machine": machine(device), "repeats": repeats, "labels_sha256": labels_sha256(labels)}
    names = tuple(dict.fromkeys((*experiment.names, ORIGINAL, SEQUENTIAL)))
    digests = {name: experiment.digest(name) for name in names}
    check_ours(path, KEYS[TIMINGS])
    kept = read_object(path)
    if kept is not None and _is_same(kept, here, digests):
        return kept
    z = draw_latents(experiment.batch_size, config.num_tokens, config.token_channels, experiment.seed).to(device)
    labels = None if labels is None else labels.to(device)
    runs = {name: partial(experiment.sampler(name), z, labels) for name in names}
    seconds, results = interleave(runs, repeats, device, after_each)
    exact = results[SEQUENTIAL].images
    denoising = 0.0
    if experiment.denoise:
        run = partial(denoise, flow, exact, labels, experiment.denoise)
        denoising = interleave({"denoise": run}, repeats, device)[0]["denoise"].median
    found = here | {
        "batch_size": experiment.batch_size,
        "denoise_seconds": denoising,
        "rows": {
            name: asdict(seconds[name])
            | {"strategy_sha256": digests[name]}
            | {"error": paired_error(getattr(results[name], "images", results[name]), exact).max}
            for name in names
        },
    }
    write_json(path, found)
    return found


def _labels(experiment: Experiment) -> Int[Tensor, " n"] | None:
    """Those of the first batch, repeated where there are fewer."""
    if experiment.labels is None:
        return None
    return experiment.labels[torch.arange(experiment.batch_size) % len(experiment.labels)]


def _is_same(kept: Mapping[str, Any], here: Mapping[str, Any], digests: Mapping[str, str | None]) -> bool:
    """Whether kept timings are of these rows, on this machine. A run may be resumed with other threads."""
    try:
        timed = {name: row["strategy_sha256"] for name, row in kept["rows"].items()}
        return (
            all(kept["machine"][name] == here["machine"][name] for name in ("processor", "device", "torch"))
            and all(kept[name] == here[name] for name in ("repeats", "labels_sha256"))
            and timed.items() >= digests.items()
        )
    except (AttributeError, KeyError, TypeError):
        return False
