"""Parallel and sequential solvers of x = g(x), four independent pieces and one loop."""

from jacobiflow.flows.base import no_gradients
from jacobiflow.solvers.certified import Certificate, certify, check_certificate, solve_certified
from jacobiflow.solvers.correction import Chord, Correction, Plain
from jacobiflow.solvers.guess import CausalLinear, Given, Guess, Latent, MeanAffine, Zeros
from jacobiflow.solvers.partition import Partition, Segments, Sequential, SlidingRun, Whole, Window
from jacobiflow.solvers.solve import Solution, Status, solve
from jacobiflow.solvers.solver import EarlyStop, MaxSweeps, Solver, Stopping, Tolerance

__all__ = [
    "CausalLinear", "Certificate", "Chord", "Correction", "EarlyStop", "Given", "Guess", "Latent", "MaxSweeps",
    "MeanAffine", "Partition", "Plain", "Segments", "Sequential", "SlidingRun", "Solution", "Solver", "Status",
    "Stopping", "Tolerance", "Whole", "Window", "Zeros", "certify", "check_certificate", "no_gradients",
    "solve", "solve_certified",
]  # fmt: skip
