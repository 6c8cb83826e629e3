"""Samplers of other papers on this library's blocks and caches, so that a comparison is of their stopping rules alone.

The rules test a change over the whole batch. No residual is measured, and no sample is solved again.

References: Zhang et al., Selective Jacobi Decoding, arXiv 2505.24791; Gu et al., STARFlow, arXiv 2506.06276 and
2511.20462 (code: apple/ml-starflow); Liu and Qin, GS-Jacobi Iteration, arXiv 2505.12849, Tables 3 and 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

import jacobiflow as jf
from jacobiflow.models.flow import Flow


@dataclass(frozen=True)
class PeerSamples:
    """Images (N, C, H, W), and the number of network calls, counted as in `jacobiflow.Samples`."""

    images: Tensor
    network_calls: int


class CountedMap:
    """The map g of a block at `z` (N, T, C), in the block's causal order, with the number of its evaluations."""

    def __init__(self, block: jf.AffineBlock, z: Tensor, labels: Tensor | None) -> None:
        self.block, self.z = block, z
        self.cache = block.init_cache(z, jf.Context(labels))
        self.network_calls = 0

    def __call__(self, x: Tensor, start: int, stop: int) -> Tensor:
        """g(x)[:, start:stop]; stores the keys of positions start-1 .. stop-2 as `x` has them."""
        self.network_calls += 1
        return self.block.update(x, self.z, start, stop, self.cache)


def selective_jacobi(flow: Flow, z: Tensor, labels: Tensor | None = None, *, threshold: float = 0.5) -> PeerSamples:
    """Selective Jacobi Decoding: the first block of sampling token by token, the others by sweeps of all tokens from 0.

    A block ends once a sweep changes every entry of the batch by less than `threshold`, or after T sweeps.
    """
    sweeps = partial(_whole_sweeps, threshold=threshold)
    return _sample(flow, z, labels, [sweeps] * (flow.config.num_blocks - 1) + [_token_by_token])


def starflow(
    flow: Flow, z: Tensor, labels: Tensor | None = None, *,
    run_length: int = 16, threshold: float = 1e-3, max_sweeps: int = 32, fresh_keys: bool = True,
) -> PeerSamples:  # fmt: skip
    """Block-wise Jacobi iteration of STARFlow: in every block, runs of `run_length` tokens, one after another, from z.

    A run is swept until the mean squared change is below `threshold` times the mean square of the new values, at most
    `max_sweeps` times. The last sweep of a run changes values whose keys are stored: with `fresh_keys` these tokens are
    evaluated again within the first sweep of the next run; the published code leaves them a sweep behind.
    """
    runs = partial(_runs, run_length=run_length, threshold=threshold, max_sweeps=max_sweeps, fresh_keys=fresh_keys)
    return _sample(flow, z, labels, [runs] * flow.config.num_blocks)


AUTOS = ("auto:1e-1", "auto:1e-2", "auto")  # our strategies beside those of peers
PEERS: Mapping[str, Callable[..., PeerSamples]] = {"Selective Jacobi Decoding": selective_jacobi, "STARFlow": starflow}

# Settings to try each of `PEERS` at, the published one first.
GRIDS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "Selective Jacobi Decoding": [{"threshold": threshold} for threshold in (0.5, 1e-2, 1e-3, 1e-4)],
    "STARFlow": [
        {"run_length": run_length, "threshold": threshold, "max_sweeps": 32, "fresh_keys": fresh_keys}
        for run_length in (16, 32, 64)
        for threshold in (1e-3, 1e-6, 1e-8)
        for fresh_keys in (False, True)
    ],
}


def gs_jacobi_grid(report: jf.CalibrationReport | None) -> list[str]:
    """Settings of the GS-Jacobi paper's Tables 3 and 4 for the tough blocks of a report.

    Tough blocks are solved token by token, or in segments whose number and sweeps multiply to T/8 or T/4. Without a
    report or a tough block, Jacobi-30 and Jacobi-60 remain.
    """
    names = ["Jacobi-30", "Jacobi-60"]
    tough = () if report is None or report.components is None else report.tough_blocks
    if report is None or not tough:
        return names
    length, crm = report.num_tokens, report.crm
    stack = "/".join(map(str, sorted(tough, key=lambda block: -crm[block])))
    names += [f"[{stack}-{length}-1-{sweeps}]" for sweeps in (6, 10, 14, 30)]
    pairs = product((length // 8, length // 4), (1, 4, 8))
    return names + [f"[{stack}-{count}-{total // count}-10]" for total, count in pairs if count <= total]


def _sample(
    flow: Flow, z: Tensor, labels: Tensor | None, solvers: Sequence[Callable[[CountedMap], Tensor]]
) -> PeerSamples:  # fmt: skip
    """Images from standard normal latents `z`, with a solver per block in encoding order."""
    maps = []

    def solve(i: int, z: Tensor) -> Tensor:
        maps.append(CountedMap(flow.inverse_block(i), z, labels))
        return solvers[i](maps[-1])

    with torch.inference_mode():
        images = flow.from_tokens(flow.map_blocks_reversed(flow.prior_tokens(z), solve))
    return PeerSamples(images, sum(g.network_calls for g in maps))


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


def _runs(g: CountedMap, run_length: int, threshold: float, max_sweeps: int, fresh_keys: bool) -> Tensor:
    x = g.z.clone()
    length = x.shape[1]
    first = 0  # the first entry that the next sweep evaluates; keys before position first - 1 are up to date
    for start in range(0, length, run_length):
        stop = min(start + run_length, length)
        sweeps, converged = 0, False
        while sweeps < max_sweeps and not converged:
            new = g(x, first, stop)[:, start - first :]
            change = (new - x[:, start:stop]).square().mean()
            converged = bool(change < threshold * new.square().mean())
            x[:, start:stop] = new
            first, sweeps = start, sweeps + 1
        # Sweep k makes token k of the run exact (Proposition 1 of the GS-Jacobi paper), so the last sweep has read all
        # tokens before that one at their final values.
        first = min(start + sweeps, stop) if fresh_keys else stop
    return x
