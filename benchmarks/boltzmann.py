"""Measures flows over tokens of molecules on two idle cores: `python -m benchmarks.boltzmann [FILE ...]`.

Each FILE is a result file. `alanine` (three minutes; docs/boltzmann.md) needs the simulations that `python -m
examples.boltzmann simulate` writes: free energies along phi of the simulations and of proposals, effective sample
sizes, and what samples that are not certified do to the weights. `boltzmann` (docs/boltzmann.md): samples with
densities of flows of the sizes of SBG's, with random weights, and of the trained flow of the example; then backward
passes of `encode` and of `decode`.
"""

from __future__ import annotations

import copy
import warnings
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import jacobiflow as jf
from benchmarks.lib.models import random_flow
from benchmarks.lib.results import Json, measure_files
from benchmarks.lib.timing import time_runs
from examples.boltzmann import BINS, bin_shares, frames, free_energies, load
from examples.molecule import PHI, PSI, torsion
from jacobiflow.comparison.baselines import CachedNetwork
from jacobiflow.models.flow import Flow
from jacobiflow.models.latents import draw_latents, log_normal
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
TRAINED = "alanine dipeptide, 4 x 2 layers of 64, trained"
BATCHES = {TRAINED: 512, **dict(zip(SIZES, (512, 64, 16, 4), strict=True))}
ROWS = 256  # Samples that are compared with float64.
ROUNDS = 3
GRADIENTS_MODEL, GRADIENTS_BATCH = "fashion-p2", 4
GROWING, LOOP, DENSITIES = "growing cache", "loop", "loop, densities"


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


@torch.no_grad()
def reverse(flow: jf.TarFlow, z: Tensor) -> tuple[Tensor, Tensor]:
    """Samples and their log-densities as SBG's code computes them: token by token, by a growing cache."""
    x, log_prob = z.clone(), log_normal(z)
    for block in reversed(flow.blocks):
        network, x = CachedNetwork(block, None, 1.0), block.permutation(x).clone()
        for t in range(1, x.shape[1]):
            log_scale, shift = network(x, t)
            x[:, t] = x[:, t] * log_scale.exp() + shift
            log_prob = log_prob - log_scale.sum(dim=-1)
        x = block.permutation.inverse(x)
    return x, log_prob


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
    size = key["size"]
    flow = load()[0] if size == TRAINED else random_flow(jf.TokenConfig(*SIZES[size]))
    z = draw_latents(key["batch"], flow.config.num_tokens, flow.config.token_dim, seed=1)
    loop = partial(jf.sample, flow, latents=z, strategy="sequential")
    densities = partial(loop, log_prob=True)
    seconds, results = time_runs({LOOP: loop, DENSITIES: densities, GROWING: partial(reverse, flow, z)}, ROUNDS)
    answers = {DENSITIES: (results[DENSITIES].tokens, results[DENSITIES].log_prob), GROWING: results[GROWING]}
    return {"seconds": seconds, "errors": errors(flow, z, answers)}


def measure_gradients(key: Json) -> Json:
    """Times the backward passes of `encode` and of `decode` of a flow, in its parameters, at random cotangents."""
    flow = jf.load(key["model"]).requires_grad_()
    num = key["batch"]
    labels = torch.arange(num) % flow.config.num_classes
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
            ([{"size": size, "batch": batch} for size, batch in BATCHES.items()], measure_samples),
            ([{"model": GRADIENTS_MODEL, "batch": GRADIENTS_BATCH}], measure_gradients),
        ],
    })  # fmt: skip


if __name__ == "__main__":
    main()
