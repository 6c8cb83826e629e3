"""Folders of samples that no flow draws."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import jacobiflow as jf
from jacobiflow.sampling.request import SamplingRequest
from jacobiflow.sampling.result import BlockStats, Samples
from tests.helpers.kills import read_files

PLAN = jf.Strategy.uniform(jf.Solver(jf.Window(4)), 1)


@cache
def tiny_flow(num_classes: int = 3) -> jf.TarFlow:
    config = jf.TarFlowConfig(1, 4, 2, 16, 1, 1, num_classes, head_dim=16, noise_std=0.1)
    return jf.TarFlow(config).eval()


def run(
    out: Path, num: int = 10, labels: Any = "each", plan: Any = lambda: PLAN, flow: Any = None, **changed: Any
) -> jf.SampleFolder:
    """A run of images that no flow draws, in shards of 4; `changed` are arguments of `sample_to_folder`."""
    labels = torch.arange(num) % 3 if isinstance(labels, str) else labels
    settings = {"strategy": "invented", "batch_size": 2, "shard_size": 4, **changed}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* not finite, since")
        patch.setattr(SamplingRequest, "run", invented)
        patch.setattr("jacobiflow.sampling.request.resolve_strategy", lambda *_: plan())
        return jf.sample_to_folder(flow or tiny_flow(), num, out, labels, **settings)


def invented(request: Any, latents: Tensor, progress: Any = None) -> Samples:
    """The latents as images. Where the first number is above 1 the sample is lost, where the second is, resolved."""
    images, certificate = latents.reshape(-1, 1, 4, 4).clone(), latents[:, 0, 2].abs()
    lost, resolved = latents[:, 0, 0] > 1, latents[:, 0, 1] > 1
    images[lost], certificate[lost] = torch.nan, torch.inf
    none, status = torch.zeros_like(lost), torch.where(lost, int(jf.Status.NONFINITE), int(jf.Status.CONVERGED))
    stats = BlockStats(5, 7, 70, 0.5, certificate, status, none, resolved, "sweeps", None)
    if progress is not None:
        progress(len(latents), len(latents), "sampling")
    return Samples(images, latents, request.context.values, None, (stats,), certificate, 1.0, None, 1.5, 0.25)


def pixels_in(folder: jf.SampleFolder) -> Any:
    """Pixels (n, h, w, c) of all samples, as the folder reads them."""
    return torch.cat(list(folder.batches())).permute(0, 2, 3, 1).numpy()


def shards(out: Path) -> dict[str, bytes]:
    """The files whose bytes depend on the spec only: shards, PNGs, manifest and strategy."""
    return {name: data for name, data in read_files(out).items() if not name.startswith(("units/", "outcome"))}
