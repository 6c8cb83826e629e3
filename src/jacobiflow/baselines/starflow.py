"""Block-wise Jacobi iteration of STARFlow: runs of tokens, one after another, in every block.

References: Gu et al., STARFlow, arXiv 2506.06276, and STARFlow-V, arXiv 2511.20462; code: apple/ml-starflow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from jacobiflow.baselines.peer import CountedMap, PeerSamples, sample_by
from jacobiflow.checks import check_count, check_flag, check_positive
from jacobiflow.flows.image_flow import ImageFlow, check_flow
from jacobiflow.flows.labels import Labels
from jacobiflow.guidance import Guidance

GRID: Sequence[Mapping[str, Any]] = [
    {"run_length": run_length, "threshold": threshold, "max_sweeps": 32, "fresh_keys": fresh_keys}
    for run_length in (16, 32, 64)
    for threshold in (1e-3, 5e-3, 1e-4, 1e-5, 1e-6, 1e-8)
    for fresh_keys in (False, True)
]


def starflow(
    flow: ImageFlow, z: Float[Tensor, "n t c"], labels: Labels | None = None,
    guidance: Guidance | None = None, *, run_length: int = 16, threshold: float = 1e-3, max_sweeps: int = 32,
    fresh_keys: bool = True,
) -> PeerSamples:  # fmt: skip
    """Block-wise Jacobi iteration of STARFlow: in every block, runs of `run_length` tokens, one after another.

    A run starts at its part of z. It is swept, x <- g(x), until the mean over run, channels and batch of the squared
    change is below `threshold` times that of the new values' squares, and at most `max_sweeps` times. Where
    `run_length` does not divide T, the last run is shorter.

    The last sweep of a run changes values whose keys it has stored. With `fresh_keys` those that may have changed are
    fed again within the first sweep of the next run, and counted. The published code leaves them a sweep behind. For
    an image it takes runs of 16, a threshold of 0.001 and 32 sweeps; for video runs of 32 or 64 in the first frame,
    four times as long in later ones, whose first sweep reads the frame before. There is no frame before an image.

    **Arguments:** `z` (N, T, C) standard normal latents, before the prior's scale; `labels` (N,), one class for all, or
    `None`.

    **Raises** `ValueError` where a setting is not positive, or `z` or `labels` do not fit the flow.
    """
    threshold = check_positive("threshold", threshold)
    run_length, max_sweeps = check_count("run_length", run_length), check_count("max_sweeps", max_sweeps)
    check_flag("fresh_keys", fresh_keys)
    check_flow(flow)
    runs = partial(_runs, run_length=run_length, threshold=threshold, max_sweeps=max_sweeps, fresh_keys=fresh_keys)
    return sample_by(flow, z, labels, guidance, [runs] * flow.config.num_blocks)


def _runs(g: CountedMap, run_length: int, threshold: float, max_sweeps: int, fresh_keys: bool) -> Tensor:
    x = g.z.clone()
    length = x.shape[1]
    first = 0  # the first entry that the next sweep evaluates; keys before position first - 1 are up to date
    for start in range(0, length, run_length):
        stop = min(start + run_length, length)
        sweeps, settled = 0, False
        while sweeps < max_sweeps and not settled:
            new = g(x, first, stop)[:, start - first :]
            change = (new - x[:, start:stop]).square().mean()
            settled = bool(change < threshold * new.square().mean())
            x[:, start:stop] = new
            first, sweeps = start, sweeps + 1
        # Sweep k settles token k of the run (Proposition 1 of the GS-Jacobi paper), so that the last sweep has read all
        # tokens before that one at their final values.
        first = min(start + sweeps, stop) if fresh_keys else stop
    return x
