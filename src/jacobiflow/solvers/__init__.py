"""Parallel and sequential solvers of x = g(x), four independent pieces and one loop."""

from jacobiflow.solvers.certified import certify, solve_certified
from jacobiflow.solvers.correction import Chord, Correction, Plain
from jacobiflow.solvers.guess import CausalLinear, Given, Guess, Latent, MeanAffine, Zeros
from jacobiflow.solvers.partition import Partition, Segments, Sequential, Whole, Window
from jacobiflow.solvers.solution import Solution, Status
from jacobiflow.solvers.solve import Solver, solve
from jacobiflow.solvers.stopping import MaxSweeps, Stopping, Tolerance

__all__ = [
    "CausalLinear", "Chord", "Correction", "Given", "Guess", "Latent", "MaxSweeps", "MeanAffine", "Partition", "Plain",
    "Segments", "Sequential", "Solution", "Solver", "Status", "Stopping", "Tolerance", "Whole", "Window", "Zeros",
    "certify", "solve", "solve_certified",
]  # fmt: skip
