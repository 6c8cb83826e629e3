"""The settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jacobiflow.utils.deprecation import renamed_arguments

_MAX_STEPS = 10**9
_MIN_LEARNING_RATE = 1e-6
# Settings that do not change the result beyond rounding, or that a resumed run may extend.
MAY_CHANGE = frozenset({"steps", "checkpoint_every", "sample_every", "accumulation", "recompute", "shard", "workers"})


@renamed_arguments(ema="ema_decay", clip="max_grad_norm", drop_label="label_dropout")
@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a training run.

    Args:
        steps: Optimizer steps in all, those of earlier runs included.
        batch_size: Samples in a step, over all processes; at most as many as the data has.
        learning_rate: Peak learning rate of AdamW. It is reached after `warmup` steps, then falls to 1e-6 by a cosine.
        weight_decay: Weight decay of AdamW.
        warmup: Steps over which the learning rate rises linearly.
        ema_decay: Decay of the exponential moving average of the weights.
        max_grad_norm: Gradients with a larger norm are clipped to it.
        label_dropout: Probability of dropping a label or a text, for classifier-free guidance.
        bf16: Compute the forward pass in bfloat16.
        accumulation: Parts of a step that a process runs one after another, which saves memory.
        recompute: Compute the activations of transformer layers again in the backward pass, which saves memory.
        shard: Shard weights, gradients and optimizer states over the processes by FSDP, layer by layer.
        workers: Processes that read and change the data, for each training process; 0 is none.
        seed: Seed of the order of the data, their noise and the dropped labels.
        checkpoint_every: Steps between checkpoints.
        sample_every: Steps between pictures of samples; the last step has one, too.

    Example:
        >>> config = TrainingConfig(steps=110, learning_rate=0.02, warmup=10)
        >>> config.rate(0), config.rate(9), config.rate(110)
        (0.002, 0.02, 1e-06)
    """

    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    warmup: int = 200
    ema_decay: float = 0.999
    max_grad_norm: float = 1.0
    label_dropout: float = 0.1
    bf16: bool = True
    accumulation: int = 1
    recompute: bool = False
    shard: bool = False
    workers: int = 0
    seed: int = 0
    checkpoint_every: int = 100
    sample_every: int = 500

    def __post_init__(self) -> None:
        from jacobiflow.utils.checks import check_count, check_fields, check_number, check_positive

        check_fields(self)
        for name in ("steps", "batch_size", "accumulation", "checkpoint_every", "sample_every"):
            check_count(name, getattr(self, name), maximum=_MAX_STEPS)
        for name, most in (("warmup", _MAX_STEPS), ("workers", 1024), ("seed", 2**63 - 1)):
            check_count(name, getattr(self, name), minimum=0, maximum=most)
        for name in ("label_dropout", "ema_decay"):
            check_number(name, getattr(self, name), expected="a number from 0 to below 1", below=1)
        for name in ("learning_rate", "max_grad_norm"):
            check_positive(name, getattr(self, name))
        check_number("weight_decay", self.weight_decay)

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return _MIN_LEARNING_RATE + 0.5 * (self.learning_rate - _MIN_LEARNING_RATE) * (1 + math.cos(math.pi * progress))
