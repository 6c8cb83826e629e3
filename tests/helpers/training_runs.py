"""What tests of training share: a small run, and what a run that was disturbed must have in common with it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import jacobiflow as jf
from jacobiflow.data import ImageDataset, digits
from jacobiflow.training import TrainingConfig, TrainMetrics, read_metrics, train
from jacobiflow.training.checkpoint import CHECKPOINT, last_step
from tests.helpers.checkpoints import assert_same

SIZES = {"width": 32, "num_blocks": 2, "layers_per_block": 1, "num_classes": 10, "head_dim": 16, "expansion": 2}
CONFIG = jf.TarFlowConfig(1, 8, 2, **SIZES, nvp=False, noise_std=0.1)  # learns its prior
# 5 batches an epoch, so that 12 steps see three orders.
SETTINGS = TrainingConfig(steps=12, batch_size=8, warmup=4, bf16=False, checkpoint_every=5, sample_every=6)


@cache
def some_digits() -> ImageDataset:
    images, labels = digits().images[:43], digits().labels
    assert labels is not None
    return ImageDataset(images, labels[:43])


def fresh(config: jf.TarFlowConfig = CONFIG) -> jf.TarFlow:
    torch.manual_seed(3)
    return jf.TarFlow(config)


def fit(out: Path, settings: TrainingConfig = SETTINGS, config: jf.TarFlowConfig = CONFIG, **calls: Any) -> jf.TarFlow:
    return train(fresh(config), some_digits(), settings, out, **calls)


def interrupt_at(*steps: int) -> Callable[[TrainMetrics], None]:
    """A signal after each of these steps; the step that follows is the last one."""

    def on_step(report: TrainMetrics) -> None:
        if report.step in steps:
            signal.raise_signal(signal.SIGINT)

    return on_step


def checkpoint(out: Path) -> dict[str, Tensor]:
    """The tensors of the checkpoint, except seconds."""
    return {name: tensor for name, tensor in load_file(out / CHECKPOINT).items() if name != "seconds"}


def assert_same_run(have: Path, want: Path, with_metrics: bool = True) -> None:
    """Equal bit for bit: parameters, averaged weights, optimizer state, and metrics except seconds."""
    assert last_step(have) == last_step(want)
    assert_same(checkpoint(have), checkpoint(want))
    assert (have / "model.safetensors").read_bytes() == (want / "model.safetensors").read_bytes()
    if with_metrics:
        first, second = ([replace(each, seconds=0) for each in read_metrics(folder)] for folder in (have, want))
        assert first == second


def error_of(call: Callable[[], object]) -> str:
    """The message of the `ValueError` that the call raises; one line."""
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(folder: Path) -> dict[str, bytes | None]:
    """All that there is below a folder, but for the lock."""
    paths = [path for path in folder.rglob("*") if path.name != ".lock"]
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}
