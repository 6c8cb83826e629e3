"""What speed-ups are measured against: the loops of original codes, and samplers of other papers."""

from jacobiflow.baselines.gs_jacobi import gs_jacobi_grid
from jacobiflow.baselines.peer import PeerSamples
from jacobiflow.baselines.registry import (
    FULL_PASSES,
    GRIDS,
    GROWING_CACHE,
    PEERS,
    SEQUENTIAL,
    original_loop,
    register_original_loop,
)

__all__ = [
    "FULL_PASSES",
    "GRIDS",
    "GROWING_CACHE",
    "PEERS",
    "SEQUENTIAL",
    "PeerSamples",
    "gs_jacobi_grid",
    "original_loop",
    "register_original_loop",
]
