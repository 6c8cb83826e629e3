"""Selective Jacobi Decoding: one block token by token, the others by sweeps of all tokens.

Reference: Zhang et al., Inference Acceleration of Autoregressive Normalizing Flows by Selective Jacobi Decoding,
arXiv 2505.24791.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.baselines.peer import CountedMap, PeerSamples, sample_by
from jacobiflow.checks import check_positive
from jacobiflow.flows.image_flow import ImageFlow, check_flow
from jacobiflow.flows.labels import Labels
from jacobiflow.guidance import Guidance

GRID: Sequence[Mapping[str, Any]] = [
    {"threshold": threshold} for threshold in (0.5, 1.0, 0.2, 0.1, 5e-2, 2e-2, 1e-2, 1e-3, 1e-4)
]


def selective_jacobi(
    flow: ImageFlow, z: Float[Tensor, "n t c"], labels: Labels | None = None,
    guidance: Guidance | None = None, *, threshold: float = 0.5,
) -> PeerSamples:  # fmt: skip
    """Selective Jacobi Decoding: the block that is sampled first token by token, the others by sweeps x <- g(x).

    A sweep is of all T tokens, from x = 0. A block is done when a sweep has changed no entry of any sample by as much
    as `threshold`, and after T sweeps, which are exact. The published threshold is 0.5.

    **Arguments:** `z` (N, T, C) standard normal latents, before the prior's scale; `labels` (N,), one class for all, or
    `None`.

    **Raises** `ValueError` where `threshold` is not positive, or `z` or `labels` do not fit the flow.
    """
    threshold = check_positive("threshold", threshold)
    check_flow(flow)
    sweeps = partial(_whole_sweeps, threshold=threshold)
    return sample_by(flow, z, labels, guidance, [sweeps] * (flow.config.num_blocks - 1) + [_token_by_token])


def _token_by_token(g: CountedMap) -> Tensor:
    x = torch.zeros_like(g.z)
    for t in range(x.shape[1]):
        x[:, t : t + 1] = g(x, t, t + 1)
    return x


def _whole_sweeps(g: CountedMap, threshold: float) -> Tensor:
    x = torch.zeros_like(g.z)
    for _ in range(x.shape[1]):
        new = g(x, 0, x.shape[1])
        change, x = (new - x).abs().max(), new
        if change < threshold:
            break
    return x
