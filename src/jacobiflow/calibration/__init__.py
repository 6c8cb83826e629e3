"""The paper's metrics of a flow's blocks: IGM, CRM, convergence, and the strategy that they propose."""

from jacobiflow.calibration.calibrate import calibrate
from jacobiflow.calibration.convergence import Trace, distances, gamma_norm, gamma_products, initial_residuals
from jacobiflow.calibration.metrics import Components, Metrics, matrix_norm, rank_correlation, tough_blocks
from jacobiflow.calibration.report import ClassSpread, Report, Settings, Spread, find_report, gs_jacobi_notation

__all__ = [
    "ClassSpread", "Components", "Metrics", "Report", "Settings", "Spread", "Trace", "calibrate",
    "distances", "find_report", "gamma_norm", "gamma_products", "gs_jacobi_notation", "initial_residuals",
    "matrix_norm", "rank_correlation", "tough_blocks",
]  # fmt: skip
