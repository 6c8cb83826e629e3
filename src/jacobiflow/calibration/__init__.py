"""Calibration: the paper's metrics of a flow's blocks, their convergence, and the strategy that they propose."""

from jacobiflow.calibration.convergence import (
    ConvergenceCurve,
    gamma_norm,
    gamma_products,
    initial_residuals,
    measure_distances,
)
from jacobiflow.calibration.gs_jacobi import gs_jacobi_notation
from jacobiflow.calibration.measure import calibrate
from jacobiflow.calibration.metrics import Components, Metrics, matrix_norm, rank_correlation, tough_blocks
from jacobiflow.calibration.report import (
    CalibrationReport,
    CalibrationSettings,
    ClassSpread,
    MeanStd,
    find_report,
)

__all__ = [
    "CalibrationReport", "CalibrationSettings", "ClassSpread", "Components", "ConvergenceCurve", "MeanStd",
    "Metrics", "calibrate", "find_report", "gamma_norm", "gamma_products", "gs_jacobi_notation",
    "initial_residuals", "matrix_norm", "measure_distances", "rank_correlation", "tough_blocks",
]  # fmt: skip
