"""The paper's metrics of a flow's blocks: IGM, CRM, convergence, and the strategy that they propose."""

from jacobiflow.calibration.convergence import (
    ConvergenceCurve,
    distances,
    gamma_norm,
    gamma_products,
    initial_residuals,
)
from jacobiflow.calibration.measure import calibrate
from jacobiflow.calibration.metrics import Components, Metrics, matrix_norm, rank_correlation, tough_blocks
from jacobiflow.calibration.report import (
    CalibrationReport,
    ClassSpread,
    Settings,
    Spread,
    find_report,
    gs_jacobi_notation,
)

__all__ = [
    "CalibrationReport",
    "ClassSpread",
    "Components",
    "ConvergenceCurve",
    "Metrics",
    "Settings",
    "Spread",
    "calibrate",
    "distances",
    "find_report",
    "gamma_norm",
    "gamma_products",
    "gs_jacobi_notation",
    "initial_residuals",
    "matrix_norm",
    "rank_correlation",
    "tough_blocks",
]  # fmt: skip
