"""Latents and labels that are drawn sample by sample, each from the seed and its own index only."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

FIRST_CALIBRATION_LATENT = 2**40  # calibration must not see the latents that samples are drawn from
_LATENTS, _LABELS = 0, 1


def draw_latents(
    num: int, num_tokens: int, token_channels: int, seed: int = 0, start: int = 0
) -> Float[Tensor, "n t d"]:
    """Standard normal latents of samples start .. start+num-1; sample i depends on `seed` and i only."""
    shape = (num_tokens, token_channels)
    samples = range(start, start + num)
    draws = [_generator(seed, _LATENTS, i).standard_normal(shape, np.float32) for i in samples]
    return torch.from_numpy(np.stack(draws))


def draw_labels(num: int, num_classes: int, seed: int = 0, start: int = 0) -> Int[Tensor, " n"]:
    """Uniform labels of samples start .. start+num-1; that of sample i depends on `seed` and i only."""
    return torch.tensor([int(_generator(seed, _LABELS, i).integers(num_classes)) for i in range(start, start + num)])


def _generator(seed: int, stream: int, sample: int) -> np.random.Generator:
    """The random numbers of one sample: Philox keyed by the seed, with a counter of this stream's and sample's own."""
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed={seed!r}: give a whole number of at least 0")
    return np.random.Generator(np.random.Philox(key=seed, counter=(0, 0, stream, sample)))
