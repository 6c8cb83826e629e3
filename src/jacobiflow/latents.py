"""Latents and labels whose every sample depends on the seed and its own index only."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

FIRST_CALIBRATION_LATENT = 2**40  # calibration must not see the latents that samples are drawn from


def draw_latents(
    num: int, num_tokens: int, token_channels: int, seed: int = 0, start: int = 0
) -> Float[Tensor, "n t d"]:
    """Standard normal latents of samples start .. start+num-1; sample i depends on `seed` and i only.

    Each sample has its own counter in the Philox generator keyed by the seed.
    """
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed={seed!r}: give a whole number of at least 0")
    draws = [
        np.random.Generator(np.random.Philox(key=seed, counter=(0, 0, 0, i))).standard_normal(
            (num_tokens, token_channels), np.float32
        )
        for i in range(start, start + num)
    ]
    return torch.from_numpy(np.stack(draws))


def draw_labels(num: int, num_classes: int, seed: int = 0, start: int = 0) -> Int[Tensor, " n"]:
    """Uniform labels of samples start .. start+num-1; that of sample i depends on `seed` and i only."""
    return torch.tensor(
        [
            int(np.random.Generator(np.random.Philox(key=seed, counter=(0, 0, 1, i))).integers(num_classes))
            for i in range(start, start + num)
        ]
    )
