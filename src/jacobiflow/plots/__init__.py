"""Pictures: sheets of samples, curves of reports, timings, certificates, qualities; and the pages that hold them."""

from jacobiflow.plots.calibration import convergence_figure, segments_figure
from jacobiflow.plots.front import front_frames, front_still
from jacobiflow.plots.page import Page, Picture, Table, check_page, save_page
from jacobiflow.plots.quality import certificate_figure, comparison_figure
from jacobiflow.plots.sheets import comparison_sheet, image_grid, rows_sheet, trace_sheet, zoom_of
from jacobiflow.plots.speed import bench_figure
from jacobiflow.plots.style import check_picture, sampler_style, save_gif, save_png

__all__ = [
    "Page", "Picture", "Table", "bench_figure", "certificate_figure", "check_page", "check_picture",
    "comparison_figure", "comparison_sheet", "convergence_figure", "front_frames", "front_still", "image_grid",
    "rows_sheet", "sampler_style", "save_gif", "save_page", "save_png", "segments_figure", "trace_sheet", "zoom_of",
]  # fmt: skip
