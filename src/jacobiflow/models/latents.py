"""Random latents and labels. Those of a sample depend on the seed and its index only."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.utils.checks import check_count, check_seed

FIRST_CALIBRATION_LATENT = 2**40
"""The index of calibration's first latent, beyond the indices of all samples, which calibration must not see."""

MAX_SAMPLES = 100_000_000
"""The largest number of samples in a call. Sums of their bytes do not overflow."""

_LATENT_STREAM, _LABEL_STREAM = 0, 1


def draw_latents(num: int, num_tokens: int, token_dim: int, seed: int = 0, start: int = 0) -> Float[Tensor, "n t d"]:
    """Returns standard normal latents of samples start .. start+num-1; sample i depends on `seed` and i only."""
    num, seed = check_count("num", num, maximum=MAX_SAMPLES), check_seed(seed)
    # Allocated in one piece, so that a request that exceeds memory fails at once.
    latents = np.empty((num, num_tokens, token_dim), np.float32)
    for i, row in enumerate(latents):
        _generator(seed, _LATENT_STREAM, start + i).standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(latents)


def draw_labels(num: int, num_classes: int, seed: int = 0, start: int = 0) -> Int[Tensor, " n"]:
    """Returns uniform labels of samples start .. start+num-1; that of sample i depends on `seed` and i only."""
    generators = (_generator(seed, _LABEL_STREAM, start + i) for i in range(num))
    labels = [int(generator.integers(num_classes)) for generator in generators]
    return torch.tensor(labels, dtype=torch.int64, device="cpu")


def log_normal(z: Float[Tensor, "n t d"]) -> Float[Tensor, " n"]:
    """Returns log N(z; 0, I) in nats."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=(1, 2))


def _generator(seed: int, stream: int, sample: int) -> np.random.Generator:
    """Returns the random numbers of one sample: Philox keyed by the seed, its counter at the stream and the sample."""
    return np.random.Generator(np.random.Philox(key=seed, counter=(0, 0, stream, sample)))
