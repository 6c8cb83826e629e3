"""A Boltzmann generator for alanine dipeptide: `python -m examples.boltzmann simulate`, then `train`, then `weigh`.

`weigh` works with the bundled weights, without a simulation. `train` writes its losses to the run folder. The example
needs openmm: pip install openmm.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from openmm.unit import MOLAR_GAS_CONSTANT_R
from torch import Tensor
from torch.utils.data import Dataset

import jacobiflow as jf
from examples.molecule import ATOMS, BIAS, KELVIN, PHI, PSI, energies, simulation, to_internal, to_positions, torsion
from jacobiflow import training
from jacobiflow.utils.files import atomic_path

MODEL = Path(__file__).parent / "alanine-dipeptide"
TRAJECTORIES = Path("out/alanine-dipeptide")
RUN = Path("runs/alanine-dipeptide")
CONFIG = jf.TokenConfig(num_tokens=22, token_dim=3, width=64, num_blocks=4, layers_per_block=2, head_dim=16)
BINS = 36  # Number of bins of phi.
MASK = torch.tensor([[len(earlier) > k for k in range(3)] for _, _, earlier in ATOMS])
"""Which of bond, angle and torsion an atom has, (22, 3). The first three atoms lack six; noise takes their places."""


@dataclass(frozen=True)
class Coordinates:
    """The map from positions to tokens: bonds, angles and torsions of mean 0 and variance 1.

    A torsion t is first mapped to Phi^-1((t - cut) / 2 pi), Phi the normal distribution function: then every number is
    a torsion, and a flow need not learn where a turn ends. The cut is where samples are rarest.
    """

    cut: Float[Tensor, " 22"]
    mean: Float[Tensor, "22 3"]
    std: Float[Tensor, "22 3"]

    @classmethod
    def fit(cls, internal: Float[Tensor, "n 22 3"], weights: Float[Tensor, " n"]) -> Coordinates:
        """Returns the map for weighted samples."""
        cut = torch.zeros(len(ATOMS), dtype=torch.float64)
        for i in range(3, len(ATOMS)):
            counts, edges = np.histogram(internal[:, i, 2], 72, (-math.pi, math.pi), weights=weights)
            smooth = np.convolve(np.tile(counts, 3), np.ones(9), "same")[72:144]
            cut[i] = float(edges[smooth.argmin()]) + math.pi / 72
        plain = cls(cut, torch.zeros(22, 3).double(), torch.ones(22, 3).double())
        x = plain._unscaled(internal)
        mean = torch.tensordot(weights / weights.sum(), x, dims=1)
        var = torch.tensordot(weights / weights.sum(), (x - mean).square(), dims=1)
        return cls(cut, torch.where(MASK, mean, 0.0), torch.where(MASK, var.sqrt(), 1.0))

    def _unscaled(self, internal: Float[Tensor, "n 22 3"]) -> Float[Tensor, "n 22 3"]:
        turns = torch.remainder(internal[..., 2] - self.cut, 2 * math.pi) / (2 * math.pi)
        return torch.cat((internal[..., :2], torch.special.ndtri(turns).unsqueeze(-1)), dim=-1)

    def to_tokens(self, internal: Float[Tensor, "n 22 3"]) -> Float[Tensor, "n 22 3"]:
        """Returns the tokens of bonds, angles and torsions, with noise where an atom has none."""
        noise = torch.randn(internal.shape, dtype=torch.float64)
        return torch.where(MASK, (self._unscaled(internal) - self.mean) / self.std, noise)

    def from_tokens(
        self, tokens: Float[Tensor, "n 22 3"]
    ) -> tuple[Float[Tensor, "n 22 3"], Float[Tensor, " n"], Bool[Tensor, " n"]]:
        """Returns positions in nanometres, log|det| of the map up to a constant, and if bonds and angles exist."""
        x = torch.where(MASK, tokens.double() * self.std + self.mean, 0.0)
        turns = 2 * math.pi * torch.special.ndtr(x[..., 2:]) + self.cut.view(-1, 1)
        internal = torch.cat((x[..., :2], turns), dim=-1)
        is_valid = ((internal[..., :2] > 0) | ~MASK[:, :2]).all(dim=(1, 2)) & (internal[..., 1] < math.pi).all(dim=1)
        positions, log_det = to_positions(internal)
        return positions, log_det - 0.5 * torch.where(MASK[:, 2], x[..., 2].square(), 0.0).sum(dim=1), is_valid

    def energy(self, tokens: Float[Tensor, "n 22 3"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n 22 3"]]:
        """Returns -log of the target density of tokens, up to a constant, and their positions in nanometres.

        The target is exp(-U / kT) |det| over positions, times a standard normal where an atom has no coordinate.
        """
        positions, log_det, is_valid = self.from_tokens(tokens)
        noise = torch.where(MASK, 0.0, tokens.double())
        energy = energies(positions) - log_det + 0.5 * noise.square().sum(dim=(1, 2))
        return energy.masked_fill(~is_valid, math.inf), positions

    def save(self, path: Path) -> None:
        """Writes a JSON file."""
        path.write_text(json.dumps({name: value.tolist() for name, value in vars(self).items()}))

    @classmethod
    def load(cls, path: Path) -> Coordinates:
        """Reads what `save` wrote."""
        content = json.loads(path.read_text())
        return cls(**{name: torch.tensor(value, dtype=torch.float64) for name, value in content.items()})


def simulate(nanoseconds: int, seed: int) -> None:
    """Learns a bias along phi in 5 ns, then writes the frames of a simulation with it, one for each 0.5 ps.

    A frame counts with the weight exp(bias / kT). Every nanosecond is saved, and a stopped run keeps what it has: runs
    of other seeds add to it.
    """
    path = TRAJECTORIES / f"{seed}.npz"
    if path.exists():
        print(f"{path} is there already; another --seed adds frames to it")
        return
    run, bias = simulation(seed)
    bias.step(run, 2_500_000)
    frames, log_weights = [], []
    for i in range(nanoseconds * 2000):
        run.step(250)
        frames.append(run.context.getState(positions=True).getPositions(asNumpy=True)._value.astype(np.float32))
        energy = run.context.getState(energy=True, groups=BIAS).getPotentialEnergy()._value
        log_weights.append(energy / (MOLAR_GAS_CONSTANT_R._value * KELVIN / 1000))
        if (i + 1) % 2000 == 0:
            TRAJECTORIES.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as partial, partial.open("wb") as file:
                np.savez(file, positions=np.array(frames), log_weights=np.array(log_weights))
            print(f"{(i + 1) // 2000} of {nanoseconds} ns", flush=True)


def frames() -> tuple[Float[Tensor, "n 22 3"], Float[Tensor, " n"]]:
    """Returns the positions of all simulations, and their weights."""
    files = [np.load(path) for path in sorted(TRAJECTORIES.glob("*.npz"))]
    if not files:
        raise SystemExit(f"no simulations in {TRAJECTORIES}: run `python -m examples.boltzmann simulate` first")
    positions = torch.from_numpy(np.concatenate([file["positions"] for file in files]))
    weights = [torch.from_numpy(file["log_weights"]).softmax(dim=0) * len(file["log_weights"]) for file in files]
    return positions, torch.cat(weights) / len(positions)


class Frames(Dataset[Tensor]):
    """Tokens of frames, which are drawn by their weights, with new noise each time where an atom has no coordinate."""

    def __init__(
        self, internal: Float[Tensor, "n 22 3"], weights: Float[Tensor, " n"], coordinates: Coordinates
    ) -> None:
        self.internal, self.coordinates = internal, coordinates
        self.rows = torch.multinomial(weights, len(weights), replacement=True)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Float[Tensor, "22 3"]:
        return self.coordinates.to_tokens(self.internal[self.rows[index]].unsqueeze(0)).squeeze(0).float()


def train(steps: int) -> None:
    """Trains by maximum likelihood on frames drawn by their weights; the same command again resumes a stopped run."""
    positions, weights = frames()
    internal = to_internal(positions.double())
    coordinates = Coordinates.fit(internal, weights)
    torch.manual_seed(0)
    settings = training.TrainingConfig(steps, batch_size=128, learning_rate=3e-3, bf16=False)
    data = Frames(internal, weights, coordinates)
    average = training.train(jf.TarFlow(CONFIG), data, settings, RUN)
    average.save_pretrained(MODEL)
    coordinates.save(MODEL / "coordinates.json")


def load() -> tuple[jf.TarFlow, Coordinates]:
    """Loads the bundled flow, and the map to its tokens."""
    return jf.TarFlow.from_pretrained(MODEL).requires_grad_(False), Coordinates.load(MODEL / "coordinates.json")


def bin_shares(phi: Tensor, weights: Tensor) -> Any:
    """Returns the share of each bin of phi."""
    return np.histogram(phi, BINS, (-np.pi, np.pi), weights=weights / weights.sum())[0]


def free_energies(phi: Tensor, weights: Tensor) -> list[float]:
    """Returns F / kT of each bin of phi, -log of its share; infinite for a bin without samples."""
    with np.errstate(divide="ignore"):
        return [float(value) for value in -np.log(bin_shares(phi, weights))]


def weigh(num: int, seed: int) -> None:
    """Draws proposals with their densities, weighs them, and prints averages."""
    flow, coordinates = load()
    started = time.perf_counter()
    samples = jf.sample(flow, num, seed=seed, batch_size=512, strategy="sequential")
    print(f"{samples.outcome}; {num / (time.perf_counter() - started):,.0f} a second")
    energy, positions = coordinates.energy(samples.tokens)
    weights = jf.importance(samples, energy)
    phi, psi = (torsion(*positions[:, atoms].unbind(dim=1)) for atoms in (PHI, PSI))
    is_right = (phi > 0).double()
    share, error = weights.mean(is_right), weights.standard_error(is_right)
    print(f"effective sample size: {weights.effective_sample_size / num:.1%} of {num:,}")
    print(f"phi > 0: {is_right.mean():.2%} of proposals, {share:.2%} reweighted")
    free_energy, its_error = (1 / share - 1).log(), error / (share * (1 - share))
    print(f"free energy of phi > 0 above phi <= 0: {free_energy:.2f} ± {its_error:.2f} kT")
    print(f"mean of cos(psi): {psi.cos().mean():.4f} of proposals, {weights.mean(psi.cos()):.4f} reweighted")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("simulate", "train", "weigh"))
    parser.add_argument("--nanoseconds", type=int, default=25)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.command == "simulate":
        simulate(options.nanoseconds, options.seed)
    elif options.command == "train":
        train(options.steps)
    else:
        weigh(options.num, options.seed)
