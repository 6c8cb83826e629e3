"""Alanine dipeptide (ACE-ALA-NME) in implicit solvent: its force field, and bonds, angles and torsions as tokens."""

from __future__ import annotations

import io
import math

import openmm
import torch
from jaxtyping import Float
from openmm import app, unit
from torch import Tensor

KELVIN = 300.0
# Each atom with its place in relation to earlier ones: bonded to, angle with, torsion with. Second and third
# substituents of an atom have the first as the end of their torsion, which is then nearly fixed.
ATOMS = (
    ("CA", 8, ()), ("C", 14, (8,)), ("N", 6, (8, 14)), ("CB", 10, (8, 6, 14)), ("HA", 9, (8, 6, 14)),
    ("ACE C", 4, (6, 8, 14)), ("ACE O", 5, (4, 6, 8)), ("ACE CH3", 0, (4, 6, 5)), ("H", 7, (6, 8, 4)),
    ("O", 15, (14, 8, 6)), ("NME N", 16, (14, 8, 15)), ("NME C", 18, (16, 14, 15)), ("NME H", 17, (16, 14, 18)),
    ("ACE H1", 1, (0, 4, 5)), ("ACE H2", 2, (0, 4, 1)), ("ACE H3", 3, (0, 4, 1)),
    ("HB1", 11, (10, 8, 6)), ("HB2", 12, (10, 8, 11)), ("HB3", 13, (10, 8, 11)),
    ("NME H1", 19, (18, 16, 14)), ("NME H2", 20, (18, 16, 19)), ("NME H3", 21, (18, 16, 19)),
)  # fmt: skip
PHI, PSI = (4, 6, 8, 14), (6, 8, 14, 16)
FIELD, BIAS = {0}, {31}  # openmm's groups of forces: the force field, and what metadynamics adds
_HEAVY_ATOMS = """
HETATM    1  CH3 ACE A   1       2.000   2.090   0.000  1.00  0.00           C
HETATM    2  C   ACE A   1       3.427   2.641   0.000  1.00  0.00           C
HETATM    3  O   ACE A   1       4.391   1.877   0.000  1.00  0.00           O
HETATM    4  N   ALA A   2       3.555   3.970   0.000  1.00  0.00           N
HETATM    5  CA  ALA A   2       4.853   4.614   0.000  1.00  0.00           C
HETATM    6  CB  ALA A   2       5.661   4.221   1.232  1.00  0.00           C
HETATM    7  C   ALA A   2       5.408   4.316  -1.200  1.00  0.00           C
HETATM    8  O   ALA A   2       4.900   4.900  -2.200  1.00  0.00           O
HETATM    9  N   NME A   3       6.400   3.500  -1.300  1.00  0.00           N
HETATM   10  C   NME A   3       7.000   3.100  -2.600  1.00  0.00           C
"""  # a PDB file, to which openmm adds the hydrogens


def simulation(seed: int) -> tuple[app.Simulation, app.Metadynamics]:
    """Returns a minimised simulation at 300 K, and the metadynamics that learns a bias along phi.

    The force field is Amber ff99SB-ILDN in OBC implicit solvent. Nothing is constrained: hydrogens of 3 amu allow
    steps of 2 fs, and masses do not change which positions are likely.
    """
    field = app.ForceField("amber99sbildn.xml", "amber99_obc.xml")
    heavy = app.PDBFile(io.StringIO(_HEAVY_ATOMS.strip()))
    model = app.Modeller(heavy.topology, heavy.positions)
    model.addHydrogens(field)
    system = field.createSystem(model.topology, nonbondedMethod=app.NoCutoff, constraints=None, hydrogenMass=3)
    phi = openmm.CustomTorsionForce("theta")
    phi.addTorsion(*PHI, [])
    variable = app.BiasVariable(phi, -math.pi, math.pi, 0.35, periodic=True)
    bias = app.Metadynamics(system, [variable], KELVIN, biasFactor=10, height=1.0, frequency=500)
    integrator = openmm.LangevinMiddleIntegrator(KELVIN, 1.0, 0.002)  # kelvin, 1 / ps, ps
    integrator.setRandomNumberSeed(seed)
    run = app.Simulation(model.topology, system, integrator, openmm.Platform.getPlatformByName("Reference"))
    run.context.setPositions(model.positions)
    run.minimizeEnergy()
    run.context.setVelocitiesToTemperature(KELVIN, seed)
    return run, bias


def energies(positions: Float[Tensor, "n 22 3"]) -> Float[Tensor, " n"]:
    """Returns U / kT of positions in nanometres; infinity where openmm finds none."""
    context, scale = simulation(0)[0].context, unit.MOLAR_GAS_CONSTANT_R * KELVIN * unit.kelvin
    out = torch.full((len(positions),), math.inf, dtype=torch.float64)
    for i, place in enumerate(positions.double().numpy()):
        try:
            context.setPositions(place)
            energy = context.getState(energy=True, groups=FIELD).getPotentialEnergy() / scale
        except openmm.OpenMMException:
            continue
        out[i] = energy if math.isfinite(energy) else math.inf
    return out


def to_internal(positions: Float[Tensor, "n 22 3"]) -> Float[Tensor, "n 22 3"]:
    """Returns the bond in nanometres, the angle and the torsion of each atom; 0 for those it lacks."""
    out = torch.zeros_like(positions)
    for i, (_, atom, earlier) in enumerate(ATOMS):
        x = [positions[:, j] for j in (atom, *earlier)]
        if len(x) > 1:
            out[:, i, 0] = (x[1] - x[0]).norm(dim=-1)
        if len(x) > 2:
            out[:, i, 1] = _angle(*x[:3])
        if len(x) > 3:
            out[:, i, 2] = torsion(*x)
    return out


def to_positions(internal: Float[Tensor, "n 22 3"]) -> tuple[Float[Tensor, "n 22 3"], Float[Tensor, " n"]]:
    """Returns positions, and log|det| of the map up to rigid motions: the sum of log(bond^2 sin(angle))."""
    positions, log_det = torch.zeros_like(internal), internal.new_zeros(len(internal))
    axes = torch.eye(3, dtype=internal.dtype)
    for i, (_, atom, earlier) in enumerate(ATOMS[1:], start=1):
        bond, angle, turn = internal[:, i].unsqueeze(1).unbind(dim=2)
        log_det = log_det + 2 * bond[:, 0].abs().log()
        if len(earlier) > 1:
            log_det = log_det + angle[:, 0].sin().abs().log()
        places = [positions[:, j] for j in earlier]
        while len(places) < 3:  # The first three atoms stand in a fixed frame.
            places.append(places[-1] + axes[len(places) - 1])
        along = _unit(places[1] - places[0])
        normal = _unit(torch.linalg.cross(places[2] - places[1], along))
        across = turn.cos() * torch.linalg.cross(along, normal) + turn.sin() * normal
        positions[:, atom] = places[0] + bond * (angle.cos() * along + angle.sin() * across)
    return positions, log_det


def torsion(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Returns the torsion angle about the bond b-c, from -pi to pi (IUPAC)."""
    axis = _unit(c - b)
    first, second = torch.linalg.cross(b - a, c - b), torch.linalg.cross(c - b, d - c)
    return torch.atan2((torch.linalg.cross(first, second) * axis).sum(dim=-1), (first * second).sum(dim=-1))


def _angle(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.acos((_unit(a - b) * _unit(c - b)).sum(dim=-1).clamp(-1, 1))


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)
