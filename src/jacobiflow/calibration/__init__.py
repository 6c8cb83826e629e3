"""How hard each block of a flow is to invert: metrics, measured sweeps, and a report of them."""

from jacobiflow.calibration.calibrate import calibrate
from jacobiflow.calibration.convergence import Trace, distances
from jacobiflow.calibration.error_matrix import gamma_norm, gamma_products
from jacobiflow.calibration.metrics import (
    DOMINANCE,
    Components,
    Metrics,
    initial_residuals,
    matrix_norm,
    rank_correlation,
    tough_blocks,
)
from jacobiflow.calibration.report import ClassSpread, Report, Settings, Spread
from jacobiflow.calibration.reports import find_report
from jacobiflow.calibration.tune import TuneSettings, tune
from jacobiflow.calibration.tuning import BlockTuning, Run, Tuning

__all__ = [
    "DOMINANCE", "BlockTuning", "ClassSpread", "Components", "Metrics", "Report", "Run", "Settings", "Spread", "Trace",
    "TuneSettings", "Tuning", "calibrate", "distances", "find_report", "gamma_norm", "gamma_products",
    "initial_residuals", "matrix_norm", "rank_correlation", "tough_blocks", "tune",
]  # fmt: skip
