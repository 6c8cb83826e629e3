"""Pictures: sheets of samples, and the figure of a benchmark."""

from jacobiflow.plots.figures import bench_figure
from jacobiflow.plots.sheets import comparison_sheet, rows_sheet
from jacobiflow.plots.style import sampler_style, save_png

__all__ = ["bench_figure", "comparison_sheet", "rows_sheet", "sampler_style", "save_png"]
