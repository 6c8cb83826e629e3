"""The style of all pictures: settings, the colour of every sampler, axes, and files."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

from jacobiflow.utils.files import write_atomically

FONT_SIZE = 10  # points, of all text in figures
DPI = 200
SHEET: Any = {  # whose type would be matplotlib's, which lists every setting
    "font.size": FONT_SIZE,
    "axes.titlesize": "medium",
    "figure.titlesize": "medium",
    "figure.labelsize": "medium",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}
styled = matplotlib.rc_context(SHEET)  # decorates a function that draws; the caller's settings stay

INK, FAINT = "#222222", "#e6e6e6"
FINAL, WAITING = "#a9b5c4", "#f2f2f2"  # of tokens; those that are being swept have their sampler's colour
TOUGH, EASY = "#3d4a5c", "#a9b5c4"  # of blocks
ORDERED = matplotlib.colormaps["viridis"]  # of what comes in an order, such as segments


class Style(NamedTuple):
    """The colour and the marker of a sampler's points."""

    color: str
    marker: str


# By the start of a sampler's name, in lower case. The colours are of different lightness, for print in grey, and
# colour-blind readers can tell all of them from each other.
SAMPLERS = {
    r"auto\b": Style("#00519e", "o"),
    r"original|growing cache|token loop|full passes": Style("#959595", "D"),
    r"sequential": Style("#000000", "s"),
    r"jacobi\b": Style("#fba652", "v"),
    r"gs-jacobi|\[": Style("#c13a0f", "P"),
    r"window\b": Style("#1f8f54", "^"),
    r"selective jacobi": Style("#580656", "X"),
    r"starflow": Style("#57adf3", "*"),
}
OTHER = Style("#e5cd07", "p")


def sampler_style(name: str) -> Style:
    """Returns the style of a sampler or strategy, the same in every figure.

    Strategies that differ in settings only, such as "window:32" and "window:64", share a style.
    """
    if name.endswith(".json"):
        return OTHER
    return next((style for start, style in SAMPLERS.items() if re.match(start, name.lower())), OTHER)


def new_figure(height: float) -> Figure:
    """Returns an empty figure, `height` in inches, so narrow that its text is readable on a phone."""
    return Figure(figsize=(5.6, height), dpi=DPI, layout="constrained")


def clear(axis: Axes) -> None:
    """Removes the frame at the top and the right, and draws a faint grid."""
    axis.grid(color=FAINT, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def plain_ticks(axis: Axis, subs: Sequence[float] = (1, 2, 5)) -> None:
    """Labels a logarithmic axis with plain numbers, at `subs` times the powers of ten."""
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def save_png(image: Image.Image | Figure, path: str | Path) -> None:
    """Writes a PNG; the file appears whole or not at all."""
    data = io.BytesIO()
    if isinstance(image, Figure):
        with matplotlib.rc_context(SHEET):
            image.savefig(data, format="png", dpi=DPI)
    else:
        image.save(data, "PNG")
    write_atomically(path, data.getvalue())
