"""The Boltzmann generator of examples/: geometry against a dense Jacobian, weights against openmm's energies."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import jacobiflow as jf

pytest.importorskip("openmm")
from examples.boltzmann import MASK, load
from examples.molecule import ATOMS, PHI, energies, to_internal, torsion
from jacobiflow.models.latents import draw_latents

pytestmark = pytest.mark.usefixtures("one_thread")


def test_positions_have_the_coordinates_that_they_were_made_of() -> None:
    coordinates = load()[1]
    tokens = torch.where(MASK, draw_latents(50, 22, 3).double(), 0.0)
    positions, _, is_possible = coordinates.from_tokens(tokens)
    assert is_possible.all()
    again = coordinates.to_tokens(to_internal(positions))
    torch.testing.assert_close(torch.where(MASK, again, 0.0), tokens, rtol=0, atol=1e-8)
    mirrored = to_internal(positions * torch.tensor([1.0, 1.0, -1.0]))
    torch.testing.assert_close(torch.cos(mirrored[..., 2]), torch.cos(to_internal(positions)[..., 2]))
    assert not torch.allclose(mirrored[:, 3:, 2], to_internal(positions)[:, 3:, 2], atol=0.1)


def test_the_volume_is_that_of_the_dense_jacobian() -> None:
    """The volume of the first three atoms is that of two bonds and an angle in space."""
    coordinates = load()[1]
    tokens = torch.where(MASK, draw_latents(2, 22, 3, seed=1).double(), 0.0)
    positions, log_det, _ = coordinates.from_tokens(tokens)
    others = [atom for _, atom, _ in ATOMS[3:]]

    def of_others(row: Tensor) -> Tensor:
        return coordinates.from_tokens(torch.cat((first, row.view(1, 19, 3)), dim=1))[0][0, others].flatten()

    dense = []
    for row, internal in zip(tokens, to_internal(positions), strict=True):
        first = row[None, :3]
        jacobian = torch.autograd.functional.jacobian(of_others, row[3:].flatten())
        first_atoms = internal[1:3, 0].prod().square() * internal[2, 1].sin()
        dense.append(torch.linalg.slogdet(jacobian)[1] + first_atoms.log())
    torch.testing.assert_close(log_det[0] - log_det[1], dense[0] - dense[1])


def test_weighted_proposals_are_boltzmann_s() -> None:
    """A third of the samples counts, and float32 leaves the weights as float64 has them."""
    flow, coordinates = load()
    z = draw_latents(400, 22, 3, seed=5)
    samples = jf.sample(flow, latents=z)
    energy, positions = coordinates.energy(samples.tokens)
    weights = jf.importance(samples, energy)
    assert weights.effective_sample_size > 400 / 3
    exact, log_prob = jf.decode(flow.double(), z.double(), strategy="sequential", log_prob=True)
    other = jf.ImportanceWeights(-coordinates.energy(exact)[0] - log_prob)
    assert weights.effective_sample_size == pytest.approx(other.effective_sample_size, rel=0.01)
    phi = torsion(*positions[:, PHI].unbind(dim=1))
    assert weights.mean((phi > 0).double()) < 0.06


def test_an_impossible_molecule_has_no_weight() -> None:
    coordinates = load()[1]
    tokens = torch.zeros(2, 22, 3)
    tokens[1, 4, 0] = -1e3  # a bond below 0
    energy, positions = coordinates.energy(tokens)
    assert math.isfinite(energy[0])
    assert energy[1] == math.inf
    assert energies(positions[:1])[0].isfinite()
