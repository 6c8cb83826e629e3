"""A small training run for several processes, one of which may end it: see its options."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

import jacobiflow as jf
from jacobiflow.data import ImageDataset
from jacobiflow.training import TrainingConfig, TrainMetrics, train
from jacobiflow.training.checkpoint import CHECKPOINT
from jacobiflow.training.processes import process_group, rank
from tests.helpers.training_runs import CONFIG, some_digits

NAMES = tuple("abcdefghij")


class Digits(ImageDataset):
    """Images, of which the process of rank `victim` reads none after the first checkpoint."""

    victim, checkpoint = -1, Path()

    def __getitem__(self, index: Any) -> Any:
        if rank() == Digits.victim and Digits.checkpoint.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def run(out: str, shard: bool = False, stop: int = -1, kill: int = -1) -> float:
    """Trains six steps; returns the share of the parameters that this process has."""

    def on_step(metrics: TrainMetrics) -> None:
        if metrics.step == stop:
            signal.raise_signal(signal.SIGTERM)

    Digits.victim, Digits.checkpoint = kill, Path(out, CHECKPOINT)
    torch.manual_seed(rank())  # The weights of the first process count.
    flow, digits = jf.TarFlow(CONFIG), some_digits()
    config = TrainingConfig(
        6, batch_size=12, warmup=4, bf16=False, checkpoint_every=2, shard=shard, recompute=True, accumulation=2
    )  # fmt: skip
    data = Digits(digits.images, digits.labels, NAMES)
    train(flow, data, config, out, held_out=Subset(digits, range(31)), on_step=on_step)
    local = [getattr(each, "_local_tensor", each).numel() for each in flow.parameters()]
    return sum(local) / sum(each.numel() for each in flow.parameters())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("--stop", type=int, default=-1, help="the step after which a signal comes")
    parser.add_argument("--kill", type=int, default=-1, help="the rank of the process that is killed")
    with process_group():
        print("share", run(**vars(parser.parse_args())))
