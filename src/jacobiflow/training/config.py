"""How to train."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from jacobiflow.checks import check_count, check_flag, check_kind, check_number, check_positive, convert_numbers
from jacobiflow.data.augmentation import Augmentation
from jacobiflow.data.noise import Noise
from jacobiflow.errors import InputValueError

MOST_STEPS = 10**9
_MIN_RATE = 1e-6
_FREE = ("steps", "checkpoint_every", "sample_every")


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    `steps`, `warmup`, `checkpoint_every` and `sample_every` count optimiser steps, a billion at most. The learning rate
    rises linearly over `warmup` steps, then falls to 1e-6 by a cosine. `drop_label` is the share of labels replaced by
    "none", `ema` the decay of the averaged weights, `clip` the largest gradient norm, `bf16` autocasts to bfloat16.

    **Raises** `ValueError` where a value is out of range, `TypeError` where it is of another kind.
    """

    steps: int
    noise: Noise = field(default_factory=lambda: Noise("gaussian", 0.1))
    augmentation: Augmentation = field(default_factory=Augmentation)
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    warmup: int = 200
    ema: float = 0.999
    clip: float = 1.0
    drop_label: float = 0.1
    bf16: bool = True
    seed: int = 0
    checkpoint_every: int = 100
    sample_every: int = 1000

    def __post_init__(self) -> None:
        convert_numbers(self)
        for name in ("steps", "checkpoint_every", "sample_every"):
            check_count(name, getattr(self, name), most=MOST_STEPS)
        check_count("batch_size", self.batch_size)
        check_count("warmup", self.warmup, least=0, most=MOST_STEPS)
        check_count("seed", self.seed, least=0, most=2**63 - 1)
        check_kind("noise", self.noise, Noise, "a Noise")
        check_kind("augmentation", self.augmentation, Augmentation, "an Augmentation")
        check_flag("bf16", self.bf16)
        for name in ("drop_label", "ema"):
            check_number(name, getattr(self, name), give="a number from 0 to below 1")
            if getattr(self, name) >= 1:
                raise InputValueError(f"{name}={getattr(self, name)}: give a number from 0 to below 1")
        for name in ("learning_rate", "clip"):
            check_positive(name, getattr(self, name))
        check_number("weight_decay", self.weight_decay)

    def rate(self, step: int) -> float:
        """Learning rate of `step`, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return _MIN_RATE + 0.5 * (self.learning_rate - _MIN_RATE) * (1 + math.cos(math.pi * progress))

    def fixed(self) -> dict[str, Any]:
        """What a run that resumes must share with the run before; the noise's `std` is that of the flow's config."""
        return {name: value for name, value in asdict(self).items() if name not in _FREE} | {"noise": self.noise.kind}
