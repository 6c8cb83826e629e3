"""Pictures: sheets of samples, curves of reports, timings."""

from jacobiflow.plots.figures import bench_figure, convergence_figure, segments_figure
from jacobiflow.plots.sheets import comparison_sheet, rows_sheet, trace_sheet
from jacobiflow.plots.style import sampler_style, save_png

__all__ = [
    "bench_figure", "comparison_sheet", "convergence_figure", "rows_sheet", "sampler_style", "save_png",
    "segments_figure", "trace_sheet",
]  # fmt: skip
