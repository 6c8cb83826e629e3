"""Settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from jacobiflow.checks import check_count, check_fields, check_number, check_positive, short
from jacobiflow.data.augmentation import Augmentation
from jacobiflow.data.noise import Noise
from jacobiflow.errors import InputValueError

_MOST_STEPS = 10**9
_MIN_RATE = 1e-6


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Args:
        steps: Optimiser steps in all.
        noise: The noise of the images. Its `std` must be that of the flow's config.
        augmentation: Random changes of the images.
        batch_size: Images in a step.
        learning_rate: Peak rate of AdamW. The rate rises linearly over `warmup` steps, then falls to 1e-6 by a cosine.
        weight_decay: Of AdamW.
        warmup: Steps of linear warm-up.
        ema: Decay of the averaged weights.
        clip: Largest gradient norm.
        drop_label: Share of labels that are dropped, for classifier-free guidance.
        bf16: Whether the forward pass is autocast to bfloat16.
        seed: Fixes the order of the images, their noise and the dropped labels.
        checkpoint_every: Steps between checkpoints.
        sample_every: Steps between calls of `on_sample`.

    Example:
        >>> config = TrainConfig(steps=110, learning_rate=0.02, warmup=10)
        >>> config.rate(0), config.rate(9), config.rate(110)
        (0.002, 0.02, 1e-06)
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
        check_fields(self)
        for name in ("steps", "batch_size", "checkpoint_every", "sample_every"):
            check_count(name, getattr(self, name), most=_MOST_STEPS)
        for name, most in (("warmup", _MOST_STEPS), ("seed", 2**63 - 1)):
            check_count(name, getattr(self, name), least=0, most=most)
        for name in ("drop_label", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise InputValueError(f"{name}={short(getattr(self, name))}: give a number from 0 to below 1")
        for name in ("learning_rate", "clip"):
            check_positive(name, getattr(self, name))
        check_number("weight_decay", self.weight_decay)

    def rate(self, step: int) -> float:
        """Returns the learning rate of `step`, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return _MIN_RATE + 0.5 * (self.learning_rate - _MIN_RATE) * (1 + math.cos(math.pi * progress))
