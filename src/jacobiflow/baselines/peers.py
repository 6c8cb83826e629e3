"""Samplers that compete with this library's, from their papers, and the grids of settings to try them at.

`selective_jacobi` and `starflow` decode the weights of a flow under the stopping rules of others, over
the same caches as the library's own solvers, so that a comparison is of the rules alone. Both stop on a change that is
taken over the whole batch, and return what they have: no residual is measured, nothing is solved again, and a value
that overflows stays. GS-Jacobi is a strategy of this library: `gs_jacobi_grid`.

`PEERS` has the samplers by name, `GRIDS` settings for each, the published one first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jacobiflow.calibration import Report
from jacobiflow.flows.base import AffineBlock
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.guidance import Guidance, guided
from jacobiflow.strategy import Strategy


@dataclass(frozen=True)
class PeerSamples:
    """Images (N, C, H, W), not clipped, and their cost over all blocks.

    `network_calls` counts evaluations of a block, under guidance of two rows a sample; `token_evaluations` tokens times
    samples over these calls. Both are counted as in `jacobiflow.Samples`.
    """

    images: Tensor
    network_calls: int
    token_evaluations: int


class _Map:
    """The map g of a block at `z` (N, T, C), in the block's causal order, and what its evaluations have cost."""

    def __init__(self, block: AffineBlock, z: Tensor, labels: Tensor | None) -> None:
        self.block, self.z = block, z
        self.cache = block.init_cache(z, labels)
        self.network_calls = self.token_evaluations = 0

    def __call__(self, x: Tensor, start: int, stop: int) -> Tensor:
        """g(x)[:, start:stop]; stores the keys of positions start-1 .. stop-2 as `x` has them."""
        self.network_calls += 1
        self.token_evaluations += len(x) * (stop - start)
        return self.block.update(x, self.z, start, stop, self.cache)


def selective_jacobi(
    flow: ImageFlow, z: Tensor, labels: Tensor | None = None, guidance: Guidance | None = None, *,
    threshold: float = 0.5,
) -> PeerSamples:  # fmt: skip
    """Selective Jacobi Decoding: the block that is sampled first token by token, the others by sweeps x <- g(x).

    A sweep is of all T tokens, from x = 0. A block is done when a sweep has changed no entry of any sample by as much
    as `threshold`, and after T sweeps, which are exact. The published threshold is 0.5.

    **Arguments:** `z` (N, T, C) standard normal latents, before the prior's scale; `labels` (N,) or `None`.

    **Raises** `ValueError` where `threshold` is not positive, or `z` or `labels` do not fit the flow.

    Reference: Zhang et al., Inference Acceleration of Autoregressive Normalizing Flows by Selective Jacobi Decoding,
    arXiv 2505.24791.
    """
    _check_threshold(threshold)
    sweeps = partial(_whole_sweeps, threshold=threshold)
    return _sample(flow, z, labels, guidance, [sweeps] * (len(flow.blocks) - 1) + [_token_by_token])


def starflow(
    flow: ImageFlow, z: Tensor, labels: Tensor | None = None, guidance: Guidance | None = None, *,
    run_length: int = 16, threshold: float = 1e-3, max_sweeps: int = 32, fresh_keys: bool = True,
) -> PeerSamples:  # fmt: skip
    """Block-wise Jacobi iteration of STARFlow: in every block, runs of `run_length` tokens, one after another.

    A run starts at its part of z. It is swept, x <- g(x), until the mean over run, channels and batch of the squared
    change is below `threshold` times that of the new values' squares, and at most `max_sweeps` times. Where
    `run_length` does not divide T, the last run is shorter.

    The last sweep of a run changes values whose keys it has stored. With `fresh_keys` those that may have changed are
    fed again within the first sweep of the next run, and counted. The published code leaves them a sweep behind. For
    an image it takes runs of 16, a threshold of 0.001 and 32 sweeps; for video runs of 32 or 64 in the first frame,
    four times as long in later ones, whose first sweep reads the frame before. There is no frame before an image.

    **Arguments:** `z` (N, T, C) standard normal latents, before the prior's scale; `labels` (N,) or `None`.

    **Raises** `ValueError` where a setting is not positive, or `z` or `labels` do not fit the flow.

    References: Gu et al., STARFlow, arXiv 2506.06276, and STARFlow-V, arXiv 2511.20462; code: apple/ml-starflow.
    """
    _check_threshold(threshold)
    for name, value in (("run_length", run_length), ("max_sweeps", max_sweeps)):
        if value < 1:
            raise ValueError(f"{name}={value}: give a positive whole number")
    runs = partial(_runs, run_length=run_length, threshold=threshold, max_sweeps=max_sweeps, fresh_keys=fresh_keys)
    return _sample(flow, z, labels, guidance, [runs] * len(flow.blocks))


def gs_jacobi_grid(report: Report) -> dict[str, Strategy]:
    """The settings of the GS-Jacobi paper's Tables 3 and 4, by their notation, for the tough blocks of a report.

    Segments and sweeps multiply to 128 and 256 as published, and to T/8 and T/4, which these are where T is 1024. Every
    such pair comes with each number of sweeps that the paper gives the other blocks of its models. A model of two tough
    blocks also has the settings of Table 4b, where the tougher of them has more segments, or is solved token by token.
    Guesses are those of the smallest IGM.

    **Raises** `ValueError` where the report has no CRM.

    Reference: Liu and Qin, Accelerate TarFlow Sampling with GS-Jacobi Iteration, arXiv 2505.12849.
    """
    length = report.num_tokens
    tough = sorted(report.tough_blocks, key=lambda block: -report.crm[block])
    stack = "/".join(map(str, tough))
    texts = ["Jacobi-30", "Jacobi-60", *(f"[{stack}-{length}-1-{rest}]" for rest in (6, 8, 10, 20, 30))]
    for total in (128, 256, length // 8, length // 4):
        for count in (1, 2, 4, 8, 16, 32):
            if count <= min(total, length):
                texts += [f"[{stack}-{count}-{total // count}-{rest}]" for rest in (6, 10, 20)]
    if len(tough) == 2:
        for count, sweeps in ((1, 64), (2, 32), (4, 16), (8, 8), (4, 24), (8, 13)):
            texts.append(f"[{stack}-{length}/{count}-1/{sweeps}-6]")
        texts += [f"[{stack}-16/8-{sweeps}/13-6]" for sweeps in (8, 10, 12)]
    return {text: Strategy.parse(text, report) for text in texts}


PEERS: Mapping[str, Callable[..., PeerSamples]] = {
    "Selective Jacobi Decoding": selective_jacobi,
    "STARFlow": starflow,
}
GRIDS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "Selective Jacobi Decoding": [
        {"threshold": threshold} for threshold in (0.5, 1.0, 0.2, 0.1, 5e-2, 2e-2, 1e-2, 1e-3, 1e-4)
    ],
    "STARFlow": [
        {"run_length": run_length, "threshold": threshold, "max_sweeps": 32, "fresh_keys": fresh_keys}
        for run_length in (16, 32, 64)
        for threshold in (1e-3, 5e-3, 1e-4, 1e-5, 1e-6, 1e-8)
        for fresh_keys in (False, True)
    ],
}


def _sample(
    flow: ImageFlow, z: Tensor, labels: Tensor | None, guidance: Guidance | None,
    solvers: Sequence[Callable[[_Map], Tensor]],
) -> PeerSamples:  # fmt: skip
    """Decode `z` with a solver per block, in encoding order."""
    want = (flow.config.num_tokens, flow.config.token_channels)
    if z.ndim != 3 or z.shape[1:] != want or not len(z):
        raise ValueError(f"z of shape {tuple(z.shape)}: this flow takes (N, {want[0]}, {want[1]})")
    if labels is not None:
        flow.check_labels(labels, len(z))
    maps = []
    with torch.inference_mode():
        x = z * flow.var.sqrt()
        for block, solve in zip(reversed(flow.blocks), reversed(solvers), strict=True):
            maps.append(_Map(guided(block, guidance), block.permutation(x), labels))
            x = block.permutation(solve(maps[-1]))
        images = flow.to_images(x)
    return PeerSamples(images, sum(g.network_calls for g in maps), sum(g.token_evaluations for g in maps))


def _token_by_token(g: _Map) -> Tensor:
    x = g.z.clone()
    for t in range(x.shape[1]):
        x[:, t : t + 1] = g(x, t, t + 1)
    return x


def _whole_sweeps(g: _Map, threshold: float) -> Tensor:
    x = torch.zeros_like(g.z)
    for _ in range(x.shape[1]):
        new = g(x, 0, x.shape[1])
        change, x = (new - x).abs().max(), new
        if change < threshold:
            break
    return x


def _runs(g: _Map, run_length: int, threshold: float, max_sweeps: int, fresh_keys: bool) -> Tensor:
    x = g.z.clone()
    length = x.shape[1]
    known = 0  # the cache is to be relied on before position known - 1
    for start in range(0, length, run_length):
        stop = min(start + run_length, length)
        sweeps, settled = 0, False
        while sweeps < max_sweeps and not settled:
            new = g(x, known, stop)[:, start - known :]
            change = (new - x[:, start:stop]).square().mean()
            settled = bool(change < threshold * new.square().mean())
            x[:, start:stop] = new
            known, sweeps = start, sweeps + 1
        # Sweep k settles token k of the run, so the last one read the tokens before that as they are (Proposition 1).
        known = min(start + sweeps, stop) if fresh_keys else stop
    return x


def _check_threshold(threshold: float) -> None:
    if not 0 < threshold < math.inf:
        raise ValueError(f"threshold={threshold}: give a positive number")
