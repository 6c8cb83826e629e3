"""Measures the alanine dipeptide example: `python -m benchmarks.alanine`, about eight minutes.

It needs the simulations that `python -m examples.boltzmann simulate` writes. Writes docs/results/alanine.json, which
fills docs/boltzmann.md: free energies along phi of the simulations and of proposals, effective sample sizes, and what
samples that are not certified do to the weights.
"""

from __future__ import annotations

import copy
import time
import warnings
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import jacobiflow as jf
from benchmarks.common import RESULTS, Json, complete, parser
from examples.boltzmann import BINS, MODEL, Coordinates, bin_shares, frames, free_energies
from examples.molecule import PHI, PSI, torsion
from jacobiflow.models.flow import Flow
from jacobiflow.models.latents import draw_latents, log_normal

PROPOSALS = (10_000, 100_000)  # The maps of the second number are drawn.
LATENTS = 10_000  # Samples of each way in the table of tolerances.
PARTS = 20  # into which samples are split for an error
CERTIFIED = ("auto", "window:8, 1e-3", "window:8, 1e-2", "window:8, 1e-1")
UNCERTIFIED = ("jacobi, 1e-2", "jacobi, 1e-1", "jacobi-8", "jacobi-4", "jacobi-2")


def angles(positions: Float[Tensor, "n 22 3"]) -> tuple[Tensor, Tensor]:
    return torsion(*positions[:, PHI].unbind(dim=1)), torsion(*positions[:, PSI].unbind(dim=1))


def basin_difference(phi: Tensor, weights: Tensor) -> float:
    """The free energy of phi > 0 above that of phi <= 0, in kT."""
    is_right = phi > 0
    return float((weights[~is_right].sum() / weights[is_right].sum()).log())


def profile(positions: Tensor, weights: Tensor) -> Json:
    """Free energies with their standard errors over parts of the samples."""
    phi, _ = angles(positions.double())
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
    phi, psi = angles(positions.double())
    histogram, _, _ = np.histogram2d(phi, psi, 2 * BINS, 2 * [(-np.pi, np.pi)], weights=weights / weights.sum())
    return np.round(histogram, 7).tolist()


def simulations() -> Json:
    positions, weights = frames()
    return {"frames": len(positions), "map": ramachandran(positions, weights), **profile(positions, weights)}


def proposals(flow: Flow, coordinates: Coordinates, num: int) -> Json:
    started = time.perf_counter()
    samples = jf.sample(flow, num, seed=2, batch_size=512)
    sampling = time.perf_counter() - started
    energy, positions = coordinates.energy(samples.tokens)
    weights = jf.importance(samples, energy)
    clipped = jf.importance(samples, energy, clip=0.002)
    equal = torch.ones(num, dtype=torch.float64)
    return {
        "seconds": {"sampling": sampling, "energies": time.perf_counter() - started - sampling},
        "effective_share": weights.effective_sample_size / num,
        "clipped": {"effective_share": clipped.effective_sample_size / num,
                    "basin_difference": basin_difference(angles(positions)[0], clipped.normalized)},
        "unweighted": profile(positions, equal),
        "weighted": profile(positions, weights.normalized),
        "maps": [ramachandran(positions, equal), ramachandran(positions, weights.normalized)] * (num == PROPOSALS[-1]),
    }  # fmt: skip


def tolerances(flow: Flow, coordinates: Coordinates) -> list[Json]:
    """Samples at the same latents by several ways, beside the exact inverse in float64.

    Who does not certify takes the density of the latent: log N(z) + log|det| at x.
    """
    z = draw_latents(LATENTS, flow.config.num_tokens, flow.config.token_channels, seed=3)
    wide = copy.deepcopy(flow).double()
    exact, log_prob = jf.decode(wide, z.double(), strategy="sequential", log_prob=True)
    energy, positions = coordinates.energy(exact)
    base = -energy - log_prob
    rows = [_row("float64", base, base, exact, exact, positions, 0.0)]
    for name in (*CERTIFIED, *UNCERTIFIED):
        strategy, *tolerance = name.split(", ")
        is_certified = name in CERTIFIED
        keywords: dict[str, Any] = {"tolerance": float(tolerance[0])} if tolerance else {}
        run = partial(jf.sample, flow, latents=z, strategy=strategy, certify=is_certified, batch_size=512, **keywords)
        run()  # "auto" plans
        started = time.perf_counter()
        samples = run(log_prob=is_certified)
        seconds = time.perf_counter() - started
        energy, positions = coordinates.energy(samples.tokens)
        if is_certified:
            log_weights = jf.importance(samples, energy).log_weights
        else:
            _, log_det = flow.encode(samples.tokens)
            log_weights = -energy - (log_normal(z) + log_det).double()
        rows.append(_row(name, log_weights, base, samples.tokens, exact, positions, seconds))
    return rows


def _row(
    name: str, log_weights: Tensor, base: Tensor, x: Tensor, exact: Tensor, positions: Tensor, seconds: float
) -> Json:
    weights = jf.ImportanceWeights(log_weights)
    phi, _ = angles(positions)
    change = (log_weights - base)[base.isfinite()].abs()
    return {
        "name": name,
        "certified": name in CERTIFIED,
        "seconds": seconds,
        "largest_error": float((x.double() - exact).abs().max()),
        "median_change_of_log_weight": float(change.median()),
        "largest_change_of_log_weight": float(change.nan_to_num(torch.inf).max()),
        "effective_share": weights.effective_sample_size / len(x),
        "basin_difference": basin_difference(phi, weights.normalized),
        "free_energy": free_energies(phi, weights.normalized),
    }


def main() -> None:
    parser(__doc__).parse_args()
    warnings.simplefilter("ignore")  # samples that are not certified are what is measured
    flow = jf.load(MODEL).requires_grad_(False)
    coordinates = Coordinates.load(MODEL / "coordinates.json")

    def measure(key: Json) -> Json:
        what = key["what"]
        if what == "simulations":
            return simulations()
        if what == "tolerances":
            return {"rows": tolerances(flow, coordinates)}
        return proposals(flow, coordinates, int(what.split()[0].replace(",", "")))

    keys = ({"what": what} for what in ("simulations", *(f"{num:,} proposals" for num in PROPOSALS), "tolerances"))
    complete(RESULTS / "alanine.json", keys, measure, lambda run: print(run["what"]))


if __name__ == "__main__":
    main()
