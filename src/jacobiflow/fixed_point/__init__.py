"""Parallel and sequential solvers of x = g(x): a problem, a solver of three pieces, and one engine."""

from jacobiflow.fixed_point.bf16_sweeps import Bf16Sweeps
from jacobiflow.fixed_point.guess import Guess, Latent, WarmStart, Zeros
from jacobiflow.fixed_point.options import CertifyMode
from jacobiflow.fixed_point.partition import Partition, Segments, Sequential, SlidingRun, Whole, Window
from jacobiflow.fixed_point.solution import Solution, Status
from jacobiflow.fixed_point.solve import solve
from jacobiflow.fixed_point.solver import Solver, Stopping

__all__ = [
    "Bf16Sweeps", "CertifyMode", "Guess", "Latent", "Partition", "Segments", "Sequential", "SlidingRun", "Solution",
    "Solver", "Status", "Stopping", "WarmStart", "Whole", "Window", "Zeros", "solve",
]  # fmt: skip
