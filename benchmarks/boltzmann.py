"""Measures flows over tokens of molecules on two idle cores: `python -m benchmarks.boltzmann [FILE ...]`.

Each FILE is a result file. `alanine` (eight minutes; docs/boltzmann.md) needs the simulations that `python -m
examples.boltzmann simulate` writes: free energies along phi of the simulations and of proposals, effective sample
sizes, and what samples that are not certified do to the weights. `boltzmann` (half an hour; docs/boltzmann.md):
samples with densities of flows of the sizes of SBG's and of Prose, with random weights, and of the trained flow of the
example; then backward passes of `encode` and of `decode`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

import jacobiflow as jf
from benchmarks.lib.models import random_flow
from benchmarks.lib.process import without_native
from benchmarks.lib.results import Json, measure_files
from benchmarks.lib.timing import IN_PYTORCH, time_runs
from examples.boltzmann import BINS, MODEL, bin_shares, frames, free_energies, load
from examples.molecule import PHI, PSI, torsion
from jacobiflow.comparison.baselines import CachedNetwork
from jacobiflow.models.flow import Flow
from jacobiflow.models.latents import draw_latents, log_normal
from jacobiflow.models.tarflow import TarFlowBlock
from jacobiflow.utils.timing import time_call

CPU = torch.device("cpu")

PROPOSALS = (10_000, 100_000)  # The maps of the second number are drawn.
LATENTS = 10_000  # Samples of each way in the table of tolerances.
PARTS = 20  # into which samples are split for an error
CERTIFIED = ("auto", "window:8, 1e-3", "window:8, 1e-2", "window:8, 1e-1")
UNCERTIFIED = ("jacobi, 1e-2", "jacobi, 1e-1", "jacobi-8", "jacobi-4", "jacobi-2")

SIZES: dict[str, tuple[int, int, int, int, int]] = {  # tokens, values of a token, width, blocks, layers
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


def angles(positions: Float[Tensor, "n 22 3"]) -> tuple[Tensor, Tensor]:
    positions = positions.double()
    return torsion(*positions[:, PHI].unbind(dim=1)), torsion(*positions[:, PSI].unbind(dim=1))


def basin_difference(phi: Tensor, weights: Tensor) -> float:
    """The free energy of phi > 0 above that of phi <= 0, in kT."""
    is_right = phi > 0
    return float((weights[~is_right].sum() / weights[is_right].sum()).log())


def profile(positions: Tensor, weights: Tensor) -> Json:
    """Free energies with their standard errors over parts of the samples."""
    phi, _ = angles(positions)
    parts = [(phi[rows], weights[rows]) for rows in torch.arange(len(phi)).chunk(PARTS)]
    each = np.array([bin_shares(*part) for part in parts])
    difference = np.array([basin_difference(*part) for part in parts])
    return {
        "free_energy": free_energies(phi, weights),
        "error": (each.std(axis=0) / np.maximum(each.mean(axis=0), 1e-30) / PARTS**0.5).tolist(),
        "basin_difference": basin_difference(phi, weights),
        "basin_difference_error": float(difference.std() / PARTS**0.5),
    }


def ramachandran(positions: Tensor, weights: Tensor) -> list[list[float]]:
    """The shares of the bins of phi and psi."""
    phi, psi = angles(positions)
    histogram, _, _ = np.histogram2d(phi, psi, 2 * BINS, 2 * [(-np.pi, np.pi)], weights=weights / weights.sum())
    return np.round(histogram, 7).tolist()


def simulations(_: Json) -> Json:
    positions, weights = frames()
    return {"frames": len(positions), "map": ramachandran(positions, weights), **profile(positions, weights)}


def proposals(key: Json) -> Json:
    (flow, coordinates), num = load(), key["num"]
    sampling, samples = time_call(partial(jf.sample, flow, num, seed=2, batch_size=512), CPU)
    energies, (energy, positions) = time_call(partial(coordinates.energy, samples.tokens), CPU)
    weights, clipped = jf.importance(samples, energy), jf.importance(samples, energy, clip=0.002)
    equal = torch.ones(num, dtype=torch.float64)
    return {
        "seconds": {"sampling": sampling, "energies": energies},
        "effective_share": weights.effective_sample_size / num,
        "clipped": {"effective_share": clipped.effective_sample_size / num,
                    "basin_difference": basin_difference(angles(positions)[0], clipped.normalized)},
        "unweighted": profile(positions, equal),
        "weighted": profile(positions, weights.normalized),
        "maps": [ramachandran(positions, each) for each in (equal, weights.normalized)] * (num == PROPOSALS[-1]),
    }  # fmt: skip


def tolerances(_: Json) -> Json:
    """Samples at the same latents by several ways, beside the exact inverse in float64.

    Samples without a certificate take the density of the latent: log N(z) + log|det| at x.
    """
    flow, coordinates = load()
    z = draw_latents(LATENTS, flow.config.num_tokens, flow.config.token_dim, seed=3)
    exact, log_prob = jf.decode(copy.deepcopy(flow).double(), z.double(), strategy="sequential", log_prob=True)
    energy, positions = coordinates.energy(exact)
    base = -energy - log_prob

    def row(name: str, log_weights: Tensor, x: Tensor, positions: Tensor) -> Json:
        weights, change = jf.ImportanceWeights(log_weights), (log_weights - base)[base.isfinite()].abs()
        return {
            "name": name,
            "certified": name in CERTIFIED,
            "largest_error": float((x.double() - exact).abs().max()),
            "median_change_of_log_weight": float(change.median()),
            "largest_change_of_log_weight": float(change.nan_to_num(torch.inf).max()),
            "effective_share": weights.effective_sample_size / len(x),
            "basin_difference": basin_difference(angles(positions)[0], weights.normalized),
        }

    rows = [row("float64", base, exact, positions)]
    for name in (*CERTIFIED, *UNCERTIFIED):
        strategy, *tolerance = name.split(", ")
        certify = name in CERTIFIED
        keywords: Json = {"tolerance": float(tolerance[0])} if tolerance else {}
        samples = jf.sample(
            flow, latents=z, strategy=strategy, certify=certify, log_prob=certify, batch_size=512, **keywords
        )
        energy, positions = coordinates.energy(samples.tokens)
        if certify:
            log_weights = jf.importance(samples, energy).log_weights
        else:
            log_weights = -energy - (log_normal(z) + flow.encode(samples.tokens)[1]).double()
        rows.append(row(name, log_weights, samples.tokens, positions))
    return {"rows": rows}


class OriginalPermutation:
    """A permutation with the signature of the original code's."""

    def __init__(self, block: TarFlowBlock) -> None:
        self.permutation = block.permutation

    def __call__(self, x: Tensor, dim: int = 1, inverse: bool = False) -> Tensor:
        return self.permutation.inverse(x, dim) if inverse else self.permutation(x, dim)


class OriginalBlock(nn.Module):
    """A block as SBG's code has it: `reverse` returns x and the log-determinant, by a growing cache."""

    nvp = True

    def __init__(self, block: TarFlowBlock) -> None:
        super().__init__()
        block = copy.deepcopy(block)
        self.proj_in, self.pos_embed, self.proj_out = block.proj_in, block.pos_embed, block.proj_out
        self.attn_blocks, self.permutation = block.attn_blocks, OriginalPermutation(block)

    def embed_context(self, context: None) -> None:
        """Returns None: there is no context."""

    def reverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        block: Any = self
        network, x = CachedNetwork(block, None, 1.0), self.permutation(x).clone()
        log_det = x.new_zeros(len(x))
        for t in range(1, x.shape[1]):
            log_scale, shift = network(x, t)
            x[:, t] = x[:, t] * log_scale.exp() + shift
            log_det = log_det + log_scale.sum(dim=-1)
        return self.permutation(x, inverse=True), log_det


class OriginalFlow(nn.Module):
    """A flow as SBG's code has it."""

    def __init__(self, flow: jf.TarFlow) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(map(OriginalBlock, flow.blocks))

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
        return load()[0]
    if size != PROSE:
        return random_flow(jf.TokenConfig(*SIZES[size]))
    torch.manual_seed(0)
    orders = {name: torch.randperm(22) for name in PROSE_CONFIG.orders}
    ones = torch.ones(22).int()
    numbers = {"atom_type": torch.arange(22) + 1, "aa_type": ones, "aa_pos": ones, "seq_len": ones}
    flow = jf.Prose(PROSE_CONFIG).for_peptide(numbers, orders).eval().requires_grad_(False)
    for block in flow.blocks:
        block.proj_out.weight.normal_(std=0.1 * PROSE_CONFIG.width**-0.5)  # small enough that nothing grows
    return flow


def errors(flow: Flow, z: Tensor, answers: dict[str, tuple[Tensor, Tensor]]) -> Json:
    """The largest and root-mean-square differences of x and log q from the inverse in float64, of the first rows."""
    exact = jf.decode(copy.deepcopy(flow).double(), z[:ROWS].double(), strategy="sequential", log_prob=True)
    return {
        name: {
            what: {"largest": float((a[:ROWS] - b).abs().max()), "rms": float((a[:ROWS] - b).square().mean().sqrt())}
            for what, a, b in zip(("x", "log_prob"), answer, exact, strict=True)
        }
        for name, answer in answers.items()
    }


def measure_samples(key: Json) -> Json:
    """Seconds of a batch of samples with densities, and the errors of the original sampler's and of ours."""
    flow = flow_of(key["size"])
    z = draw_latents(key["batch"], flow.config.num_tokens, flow.config.token_dim, seed=1)
    loop = partial(jf.sample, flow, latents=z, strategy="sequential")
    densities = partial(loop, log_prob=True)
    runs: dict[str, Callable[[], Any]] = {
        LOOP: partial(loop, log_prob=False),
        DENSITIES: densities,
        IN_PYTORCH: without_native()(densities),
        "window:8": partial(jf.sample, flow, latents=z, strategy="window:8", log_prob=True),
    }
    if isinstance(flow, jf.TarFlow):
        accelerated = OriginalFlow(flow)
        jf.accelerate(accelerated)
        runs |= {GROWING: partial(OriginalFlow(flow).reverse, z), ACCELERATED: partial(accelerated.reverse, z)}
    seconds, results = time_runs(runs, ROUNDS)
    answers = {DENSITIES: (results[DENSITIES].tokens, results[DENSITIES].log_prob)}
    answers |= {GROWING: results[GROWING]} if GROWING in results else {}
    return {"seconds": seconds, "errors": errors(flow, z, answers)}


def measure_gradients(key: Json) -> Json:
    """Times the backward passes of `encode` and of `decode` of a flow, in its parameters, at random cotangents."""
    flow = jf.load(MODEL if key["model"] == MODEL.name else key["model"]).requires_grad_()
    num = key["batch"]
    labels = torch.arange(num) % flow.config.num_classes if flow.config.num_classes else None
    z = draw_latents(num, flow.config.num_tokens, flow.config.token_dim, seed=1)
    with torch.no_grad():
        x = jf.decode(flow, z, labels, strategy="sequential")
    outputs = {"decode": jf.decode(flow, z, labels, strategy="sequential"), "encode": flow.encode(x, labels)[0]}
    runs = {
        name: partial(
            torch.autograd.grad, output, list(flow.parameters()), torch.randn_like(output), retain_graph=True,
            allow_unused=True,
        )
        for name, output in outputs.items()
    }  # fmt: skip
    seconds, _ = time_runs(runs, ROUNDS)
    return {"seconds": {name: timing["median"] for name, timing in seconds.items()}}


def main() -> None:
    warnings.simplefilter("ignore")  # samples that are not certified are what is measured
    measure_files(__doc__, {
        "alanine": [
            ([{"what": "simulations"}], simulations),
            ([{"what": f"{num:,} proposals", "num": num} for num in PROPOSALS], proposals),
            ([{"what": "tolerances"}], tolerances),
        ],
        "boltzmann": [
            ([{"size": size, "batch": each} for size, batches in BATCHES.items() for each in batches], measure_samples),
            ([{"model": model, "batch": 4} for model in (*BUNDLED, MODEL.name)], measure_gradients),
        ],
    })  # fmt: skip


if __name__ == "__main__":
    main()
