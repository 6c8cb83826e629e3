"""Parallel and sequential solvers of x = g(x), four independent pieces and one loop."""

from jacobiflow.blocks.base import no_gradients
from jacobiflow.fixed_point.certificate import CertifyMode, certify, check_certify_mode, solve_certified
from jacobiflow.fixed_point.correction import Chord, Correction, Plain
from jacobiflow.fixed_point.guess import CausalLinear, Guess, Latent, MeanAffine, WarmStart, Zeros
from jacobiflow.fixed_point.partition import Partition, Segments, Sequential, SlidingRun, Whole, Window
from jacobiflow.fixed_point.solver import EarlyStop, MaxSweeps, Solver, Stopping, Tolerance
from jacobiflow.fixed_point.sweeps import Solution, Status, solve

__all__ = [
    "CausalLinear",
    "CertifyMode",
    "Chord",
    "Correction",
    "EarlyStop",
    "Guess",
    "Latent",
    "MaxSweeps",
    "MeanAffine",
    "Partition",
    "Plain",
    "Segments",
    "Sequential",
    "SlidingRun",
    "Solution",
    "Solver",
    "Status",
    "Stopping",
    "Tolerance",
    "WarmStart",
    "Whole",
    "Window",
    "Zeros",
    "certify",
    "check_certify_mode",
    "no_gradients",
    "solve",
    "solve_certified",
]  # fmt: skip
