"""Measures samples with densities of flows over tokens: `python -m benchmarks.boltzmann`, about half an hour.

The flows have the sizes of SBG's and of Prose, with random weights; that of the alanine dipeptide example is trained.
In turn: the growing cache of the original code with its log-determinant, as a live module; that module
accelerated; our loop without and with densities; a window; and an encoding pass. Then backward passes of `encode` and
of `decode`. Writes docs/results/boltzmann.json, which fills docs/boltzmann_speed.md.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import jacobiflow as jf
from benchmarks.common import IN_PYTORCH, RESULTS, Json, complete, parser, random_flow, to_json, without_native
from examples.boltzmann import MODEL
from jacobiflow.comparison.baselines import CachedNetwork
from jacobiflow.models.flow import Flow
from jacobiflow.models.latents import draw_latents, log_normal
from jacobiflow.models.tarflow import TarFlowBlock
from jacobiflow.utils.timing import time_call, time_interleaved

SIZES: dict[str, tuple[int, int, int, int, int]] = {  # tokens, values, channels, blocks, layers
    "22 x 3, 4 x 3 layers of 128": (22, 3, 128, 4, 3),
    "66 x 1, 4 x 4 layers of 256": (66, 1, 256, 4, 4),
    "63 x 3, 6 x 6 layers of 384": (63, 3, 384, 6, 6),
    "138 x 3, 8 x 8 layers of 384": (138, 3, 384, 8, 8),
}
TRAINED, PROSE = "alanine dipeptide, 4 x 2 layers of 64, trained", "Prose, 22 atoms, 8 x 8 layers of 384"
PROSE_CONFIG = jf.ProseConfig()
BATCHES = {
    **dict.fromkeys((TRAINED, "22 x 3, 4 x 3 layers of 128"), (64, 512, 2048)),
    "66 x 1, 4 x 4 layers of 256": (64,), "63 x 3, 6 x 6 layers of 384": (16,),
    "138 x 3, 8 x 8 layers of 384": (4,), PROSE: (16,),
}  # fmt: skip
ROWS = 256  # Samples that are compared with float64.
ROUNDS = 3
BUNDLED = ("fashion-p2", "emoji-p2", "digits-p1", "digits-maf")
GROWING, ACCELERATED, LOOP, DENSITIES = "growing cache", "accelerated", "loop", "loop, densities"


class Turn:
    """A permutation with the signature of the original code's."""

    def __init__(self, block: TarFlowBlock) -> None:
        self.permutation = block.permutation

    def __call__(self, x: Tensor, dim: int = 1, inverse: bool = False) -> Tensor:
        return self.permutation.inverse(x, dim) if inverse else self.permutation(x, dim)


class LiveBlock(nn.Module):
    """A block as SBG's code has it: `reverse` returns x and the log-determinant, by a growing cache."""

    nvp = True

    def __init__(self, block: TarFlowBlock) -> None:
        super().__init__()
        block = copy.deepcopy(block)
        self.proj_in, self.pos_embed, self.proj_out = block.proj_in, block.pos_embed, block.proj_out
        self.attn_blocks, self.permutation = block.attn_blocks, Turn(block)

    def embed_context(self, context: None) -> None:
        """There is none."""

    def reverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        block: Any = self
        stream, x = CachedNetwork(block, None, 1.0), self.permutation(x).clone()
        log_det = x.new_zeros(len(x))
        for t in range(1, x.shape[1]):
            log_scale, shift = stream.step(x, t - 1)
            x[:, t] = x[:, t] * log_scale.exp() + shift
            log_det = log_det + log_scale.sum(dim=-1)
        return self.permutation(x, inverse=True), log_det


class Live(nn.Module):
    """A flow as SBG's code has it."""

    def __init__(self, flow: jf.TarFlow) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(map(LiveBlock, flow.blocks))

    @torch.no_grad()
    def reverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns samples and their log-densities."""
        x, log_det = z, z.new_zeros(len(z))
        for block in reversed(self.blocks):
            x, some = block.reverse(x)  # type: ignore[operator]
            log_det = log_det + some
        return x, log_normal(z) - log_det


def flow_of(size: str) -> Flow:
    if size == TRAINED:
        return jf.load(MODEL).requires_grad_(False)
    if size != PROSE:
        return random_flow(jf.TokenConfig(*SIZES[size]))
    torch.manual_seed(0)
    orders = {name: torch.randperm(22) for name in PROSE_CONFIG.orders}
    ones = torch.ones(22).int()
    numbers = {"atom_type": torch.arange(22) + 1, "aa_type": ones, "aa_pos": ones, "seq_len": ones}
    flow = jf.Prose(PROSE_CONFIG).for_peptide(numbers, orders).eval().requires_grad_(False)
    for block in flow.blocks:
        block.proj_out.weight.normal_(std=0.1 * PROSE_CONFIG.channels**-0.5)  # small enough that nothing grows
    return flow


def errors(flow: Flow, z: Tensor, answers: dict[str, tuple[Tensor, Tensor]]) -> Json:
    """The largest and root-mean-square differences of x and log q from the inverse in float64."""
    wide = copy.deepcopy(flow).double()
    exact = jf.decode(wide, z.double(), strategy="sequential", log_prob=True)
    return {
        name: {
            what: {"largest": float((a - b).abs().max()), "rms": float((a - b).square().mean().sqrt())}
            for what, a, b in zip(("x", "log_prob"), answer, exact, strict=True)
        }
        for name, answer in answers.items()
    }


def measure(key: Json) -> Json:
    flow = flow_of(key["size"])
    z = draw_latents(key["batch"], flow.config.num_tokens, flow.config.token_channels, seed=1)
    loop = partial(jf.sample, flow, latents=z, strategy="sequential")
    densities = partial(loop, log_prob=True)
    runs: dict[str, Callable[[], Any]] = {
        LOOP: partial(loop, log_prob=False),
        DENSITIES: densities,
        IN_PYTORCH: without_native()(densities),
        "window:8": partial(jf.sample, flow, latents=z, strategy="window:8", log_prob=True),
        "encoding pass": partial(flow.encode, z),
    }
    if isinstance(flow, jf.TarFlow):
        accelerated = Live(flow)
        jf.accelerate(accelerated)
        runs = {GROWING: partial(Live(flow).reverse, z), ACCELERATED: partial(accelerated.reverse, z), **runs}
    timings, results = time_interleaved(runs, ROUNDS)
    ours = results[DENSITIES]
    answers = {DENSITIES: (ours.tokens[:ROWS], ours.log_prob[:ROWS])}
    if GROWING in runs:
        x, log_prob = results[GROWING]
        answers[GROWING] = x[:ROWS], log_prob[:ROWS]
    return {"seconds": to_json(timings), "errors": errors(flow, z[:ROWS], answers)}


def gradients(key: Json) -> Json:
    """Times the backward passes of `encode` and of `decode` of a flow, in its parameters, at random cotangents."""
    flow = jf.load(MODEL if key["model"] == MODEL.name else key["model"]).requires_grad_()
    num = key["batch"]
    labels = torch.arange(num) % flow.config.num_classes if flow.config.num_classes else None
    z = draw_latents(num, flow.config.num_tokens, flow.config.token_channels, seed=1)
    with torch.no_grad():
        x = jf.decode(flow, z, labels, strategy="sequential")
    inputs = list(flow.parameters())
    outputs: dict[str, Callable[[], Tensor]] = {
        "decode": lambda: jf.decode(flow, z, labels, strategy="sequential"),
        "encode": lambda: flow.encode(x, labels)[0],
    }
    seconds: dict[str, list[float]] = {name: [] for name in outputs}
    for _ in range(ROUNDS + 1):
        for name, make in outputs.items():
            output = make()
            loss = (output * torch.randn_like(output)).sum()
            elapsed, _ = time_call(lambda: torch.autograd.grad(loss, inputs, allow_unused=True), flow.var.device)  # noqa: B023
            seconds[name].append(elapsed)
    return {"seconds": {name: statistics.median(times[1:]) for name, times in seconds.items()}}


def main() -> None:
    parser(__doc__).parse_args()
    keys: list[Json] = [{"size": size, "batch": batch} for size, batches in BATCHES.items() for batch in batches]
    keys += [{"model": model, "batch": 4} for model in (*BUNDLED, MODEL.name)]
    complete(
        RESULTS / "boltzmann.json",
        keys,
        lambda key: (measure if "size" in key else gradients)(key),
        lambda run: print({name: value for name, value in run.items() if name != "errors"}),
    )


if __name__ == "__main__":
    main()
