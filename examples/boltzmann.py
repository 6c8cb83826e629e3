"""A Boltzmann generator for alanine dipeptide: `python boltzmann.py simulate`, then `train`, then `weigh`.

`weigh` works with the weights in alanine-dipeptide/, without a simulation. It needs openmm and matplotlib.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from molecule import ATOMS, BIAS, KELVIN, PHI, energies, simulation, to_internal, to_positions, torsion
from openmm.unit import MOLAR_GAS_CONSTANT_R
from torch import Tensor

import jacobiflow as jf

HERE = Path(__file__).parent / "alanine-dipeptide"
TRAJECTORIES = Path("out/alanine-dipeptide")
CONFIG = jf.TokenConfig(22, 3, channels=128, num_blocks=4, layers_per_block=2)
# Bonds, angles and torsions that an atom has: the first three atoms lack six, whose place is filled with noise.
HAS = torch.tensor([[len(earlier) > k for k in range(3)] for _, _, earlier in ATOMS])


class Scale:
    """Internal coordinates of unit variance; torsions are cut where they are rarest."""

    def __init__(self, cut: Tensor, mean: Tensor, std: Tensor) -> None:
        self.cut, self.mean, self.std = cut, mean, std

    @classmethod
    def fit(cls, internal: Float[Tensor, "n 22 3"]) -> Scale:
        """Returns the scale of samples."""
        cut = torch.zeros(len(ATOMS))
        for i in range(3, len(ATOMS)):
            counts, edges = np.histogram(internal[:, i, 2].numpy(), 72, (-math.pi, math.pi))
            smooth = np.convolve(np.tile(counts, 3), np.ones(9), "same")[72:144]
            cut[i] = float(edges[smooth.argmin()]) + math.pi / 72
        scale = cls(cut, torch.zeros(22, 3), torch.ones(22, 3))
        cut_internal = scale.cut_torsions(internal)
        scale.mean = torch.where(HAS, cut_internal.mean(dim=0), 0.0)
        scale.std = torch.where(HAS, cut_internal.std(dim=0), 1.0)
        return scale

    def cut_torsions(self, internal: Tensor) -> Tensor:
        turns = torch.remainder(internal[..., 2] - self.cut, 2 * math.pi) - math.pi
        return torch.cat((internal[..., :2], turns.unsqueeze(-1)), dim=-1)

    def to_tokens(self, positions: Float[Tensor, "n 22 3"], generator: torch.Generator) -> Float[Tensor, "n 22 3"]:
        """Returns the tokens of positions; noise where an atom has no coordinate."""
        tokens = (self.cut_torsions(to_internal(positions)) - self.mean) / self.std
        return torch.where(HAS, tokens, torch.randn(tokens.shape, generator=generator))

    def energy(self, tokens: Float[Tensor, "n 22 3"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n 22 3"]]:
        """Returns -log of the target density of tokens, up to a constant, and their positions in nanometres.

        The target is exp(-U / kT) times the volume of the map to positions, standard normal where an atom has no
        coordinate, and 0 where a torsion has turned past its cut.
        """
        internal = torch.where(HAS, tokens.double() * self.std + self.mean, 0.0)
        is_past = (internal[..., 2].abs() > math.pi).any(dim=-1)
        is_past |= ((internal[..., 0] <= 0) & HAS[:, 0]).any(dim=-1)
        is_past |= (((internal[..., 1] <= 0) | (internal[..., 1] >= math.pi)) & HAS[:, 1]).any(dim=-1)
        internal[..., 2] += self.cut + math.pi
        positions, log_det = to_positions(internal)
        energy = energies(positions) - log_det
        energy += 0.5 * torch.where(HAS, 0.0, tokens.double().square()).sum(dim=(1, 2))
        return energy.masked_fill(is_past, math.inf), positions

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({name: value.tolist() for name, value in vars(self).items()}))

    @classmethod
    def load(cls, path: Path) -> Scale:
        return cls(**{name: torch.tensor(value) for name, value in json.loads(path.read_text()).items()})


def simulate(nanoseconds: float, seed: int) -> None:
    """Learns a bias along phi in 5 ns, then writes the frames of a simulation with it, one for each 2 ps.

    A frame counts with the weight exp(bias / kT). Runs of other seeds add to it; every nanosecond is saved.
    """
    run, bias = simulation(seed)
    bias.step(run, 2_500_000)
    frames, log_weights = [], []
    for i in range(round(nanoseconds * 500)):
        run.step(1000)
        frames.append(run.context.getState(positions=True).getPositions(asNumpy=True)._value.astype(np.float32))
        energy = run.context.getState(energy=True, groups=BIAS).getPotentialEnergy()
        log_weights.append(energy._value / (MOLAR_GAS_CONSTANT_R._value * KELVIN / 1000))
        if (i + 1) % 500 == 0:
            TRAJECTORIES.mkdir(parents=True, exist_ok=True)
            np.savez(TRAJECTORIES / f"{seed}.npz", positions=np.array(frames), log_weights=np.array(log_weights))
            print(f"{(i + 1) // 500} of {nanoseconds:.0f} ns", flush=True)


def train(minutes: float, threads: int) -> None:
    """Trains by maximum likelihood; writes the moving average of the weights."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    positions = torch.from_numpy(np.load(TRAJECTORY)).float()
    scale = Scale.fit(to_internal(positions.double()).float())
    flow, size = jf.TarFlow(CONFIG), 256
    average = torch.optim.swa_utils.AveragedModel(
        flow, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999), use_buffers=True
    )
    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-4)
    started, step = time.perf_counter(), 0
    while (share := (time.perf_counter() - started) / (60 * minutes)) < 1:
        rate = 1e-3 * min(1, (step + 1) / 200) * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = torch.randint(len(positions), (size,), generator=generator)
        loss = -flow.log_prob(scale.to_tokens(positions[rows], generator)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(flow)
        step += 1
        if step % 100 == 0:
            print(f"step {step}, {share:.0%}: {loss.item():.3f} nats", flush=True)
            average.module.save_pretrained(HERE)
            scale.save(HERE / "scale.json")
    average.module.save_pretrained(HERE)


def weigh(num: int, seed: int) -> None:
    """Draws proposals with their densities, weighs them, and prints the effective sample size."""
    flow, scale = jf.load(HERE), Scale.load(HERE / "scale.json")
    started = time.perf_counter()
    samples = jf.sample(flow, num, seed=seed, batch_size=512)
    seconds = time.perf_counter() - started
    energy, positions = scale.energy(samples.tokens)
    weights = jf.importance(samples, energy, clip=0.002)
    phi = torsion(*[positions[:, j] for j in PHI])
    print(samples.outcome)
    print(f"{num / seconds:,.0f} proposals a second, energies in {time.perf_counter() - started - seconds:.1f} s")
    print(f"effective sample size {weights.effective_sample_size:,.0f} of {num:,}")
    print(f"phi > 0: {(phi > 0).double().mean():.3f} of proposals, {weights.mean((phi > 0).double()):.3f} reweighted")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("simulate", "train", "weigh"))
    parser.add_argument("--nanoseconds", type=float, default=100)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.command == "simulate":
        simulate(options.nanoseconds, options.seed)
    elif options.command == "train":
        train(options.minutes, options.threads)
    else:
        weigh(options.num, options.seed)
