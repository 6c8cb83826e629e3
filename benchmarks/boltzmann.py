"""Measures samples with densities of flows over tokens: `python -m benchmarks.boltzmann`, about ten minutes.

The flows have the sizes of SBG's and random weights. In turn: the growing cache of the original code with its
log-determinant, the native loop without and with densities, a window, and an encoding pass. Writes
docs/results/boltzmann.json, which fills docs/boltzmann.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import jacobiflow as jf
from benchmarks.common import RESULTS, Json, complete, parser, to_json
from jacobiflow.baselines import Stream
from jacobiflow.flows.flow import log_normal
from jacobiflow.latents import draw_latents
from jacobiflow.measuring import interleave

SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {  # tokens, values, channels, blocks, layers; batches
    "22 x 3": ((22, 3, 128, 4, 3), (64, 512, 2048)),
    "66 x 1": ((66, 1, 256, 4, 4), (64, 512)),
    "63 x 3": ((63, 3, 384, 6, 6), (16, 64)),
    "138 x 3": ((138, 3, 384, 8, 8), (8,)),
}


def flow_of(tokens: int, values: int, channels: int, blocks: int, layers: int) -> jf.TarFlow:
    torch.manual_seed(0)
    flow = jf.TarFlow(jf.TokenConfig(tokens, values, channels, blocks, layers)).eval().requires_grad_(False)
    for block in flow.blocks:
        block.proj_out.weight.normal_(std=0.3 * channels**-0.5)
    return flow


@torch.no_grad()
def growing_cache(flow: jf.TarFlow, z: Tensor) -> tuple[Tensor, Tensor]:
    """Samples and log-densities by the loop of the original code."""
    log_det = z.new_zeros(len(z))

    def solve(i: int, x: Tensor) -> Tensor:
        nonlocal log_det
        stream, x = Stream(flow.blocks[i], None, 1.0), x.clone()
        for t in range(1, x.shape[1]):
            log_scale, shift = stream.feed(x, t - 1)
            x[:, t] = x[:, t] * log_scale.exp() + shift
            log_det = log_det + log_scale.sum(dim=-1)
        return x

    return flow.invert(z, solve), log_normal(z) - log_det


def errors(flow: jf.TarFlow, z: Tensor, answers: dict[str, tuple[Tensor, Tensor]]) -> Json:
    """The largest differences of x and of log q from the inverse in float64."""
    wide = jf.TarFlow(flow.config).double().requires_grad_(False)
    wide.load_state_dict(flow.state_dict())
    x, log_prob = jf.decode(wide, z.double(), strategy="sequential", log_prob=True)
    return {
        name: {"x": float((a.double() - x).abs().max()), "log_prob": float((b.double() - log_prob).abs().max())}
        for name, (a, b) in answers.items()
    }


def measure(rounds: int, key: Json) -> Json:
    sizes, _ = SIZES[key["size"]]
    flow = flow_of(*sizes)
    z = draw_latents(key["batch"], sizes[0], sizes[1], seed=1)
    loop = partial(jf.sample, flow, latents=z, strategy="sequential")
    runs: dict[str, Callable[[], Any]] = {
        "growing cache": partial(growing_cache, flow, z),
        "loop": partial(loop, log_prob=False),
        "loop, densities": partial(loop, log_prob=True),
        "window:8": partial(jf.sample, flow, latents=z, strategy="window:8", log_prob=True),
        "encoding pass": partial(flow.encode, z),
    }
    timings, results = interleave(runs, rounds)
    ours = results["loop, densities"]
    answers = {"growing cache": results["growing cache"], "loop, densities": (ours.tokens, ours.log_prob)}
    few = {name: (x[:256], log_prob[:256]) for name, (x, log_prob) in answers.items()}
    return {"seconds": to_json(timings), "errors": errors(flow, z[:256], few)}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    options = arguments.parse_args()
    keys = [{"size": size, "batch": batch} for size, (_, batches) in SIZES.items() for batch in batches]
    complete(RESULTS / "boltzmann.json", keys, partial(measure, options.rounds))


if __name__ == "__main__":
    main()
