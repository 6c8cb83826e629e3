"""Random latents and labels, each sample from the seed and its index only."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.utils.checks import check_count, check_seed

FIRST_CALIBRATION_LATENT = 2**40  # calibration must not see the latents that samples are drawn from
MOST_SAMPLES = 100_000_000  # years of work of one processor, and sums of bytes do not overflow
_LATENTS, _LABELS = 0, 1


def draw_latents(
    num: int, num_tokens: int, token_channels: int, seed: int = 0, start: int = 0
) -> Float[Tensor, "n t d"]:
    """Returns standard normal latents of samples start .. start+num-1; sample i depends on `seed` and i only."""
    num, seed = check_count("num", num, maximum=MOST_SAMPLES), check_seed(seed)
    # In one piece, so that too large a request fails at once.
    latents = np.empty((num, num_tokens, token_channels), np.float32)
    for i, row in enumerate(latents):
        _generator(seed, _LATENTS, start + i).standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(latents)


def draw_labels(num: int, num_classes: int, seed: int = 0, start: int = 0) -> Int[Tensor, " n"]:
    """Returns uniform labels of samples start .. start+num-1; that of sample i depends on `seed` and i only."""
    labels = np.empty(num, np.int64)
    for i in range(num):
        labels[i] = _generator(seed, _LABELS, start + i).integers(num_classes)
    return torch.from_numpy(labels)


def _generator(seed: int, stream: int, sample: int) -> np.random.Generator:
    """The random numbers of one sample: Philox keyed by the seed, with a counter for the stream and the sample."""
    return np.random.Generator(np.random.Philox(key=seed, counter=(0, 0, stream, sample)))
