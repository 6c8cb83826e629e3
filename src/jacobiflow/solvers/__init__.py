"""Parallel and sequential solvers of x = g(x), four independent pieces and one loop."""

from jacobiflow.solvers.causal_linear import CausalLinear
from jacobiflow.solvers.certified import Certificate, certify, check_certificate, solve_certified
from jacobiflow.solvers.chord import Chord
from jacobiflow.solvers.correction import Correction, Plain
from jacobiflow.solvers.guess import Given, Guess, Latent, MeanAffine, Zeros
from jacobiflow.solvers.partition import Partition, Segments, Sequential, SlidingRun, Whole, Window
from jacobiflow.solvers.solution import Solution, Status
from jacobiflow.solvers.solve import no_gradients, solve
from jacobiflow.solvers.solver import Solver
from jacobiflow.solvers.stopping import EarlyStop, MaxSweeps, Stopping, Tolerance

__all__ = [
    "CausalLinear", "Certificate", "Chord", "Correction", "EarlyStop", "Given", "Guess", "Latent", "MaxSweeps",
    "MeanAffine", "Partition", "Plain", "Segments", "Sequential", "SlidingRun", "Solution", "Solver", "Status",
    "Stopping", "Tolerance", "Whole", "Window", "Zeros", "certify", "check_certificate", "no_gradients",
    "solve", "solve_certified",
]  # fmt: skip
