"""Style of all pictures: matplotlib's settings, the colour of every sampler, axes, and files."""

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
RC_PARAMS: Any = {  # matplotlib's own type lists every setting
    "font.size": FONT_SIZE,
    "axes.titlesize": "medium",
    "figure.titlesize": "medium",
    "figure.labelsize": "medium",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}
use_style = matplotlib.rc_context(RC_PARAMS)  # decorates a function that draws; keeps the caller's settings

GRID_COLOR = "#e6e6e6"


class Style(NamedTuple):
    """The colour and the marker of a sampler's points."""

    color: str
    marker: str


# By the start of a sampler's name, in lower case. The colours differ in lightness, for print in grey, and for
# colour-blind readers.
SAMPLER_STYLES = {
    r"auto\b": Style("#00519e", "o"),
    r"original|growing cache|token loop|full passes": Style("#959595", "D"),
    r"sequential": Style("#000000", "s"),
    r"jacobi\b": Style("#fba652", "v"),
    r"gs-jacobi|\[": Style("#c13a0f", "P"),
    r"window\b": Style("#1f8f54", "^"),
    r"selective jacobi": Style("#580656", "X"),
    r"starflow": Style("#57adf3", "*"),
}
OTHER_STYLE = Style("#e5cd07", "p")


def sampler_style(name: str) -> Style:
    """Returns the style of a sampler or strategy, the same in every figure.

    Strategies that differ only in their settings, such as "window:32" and "window:64", share a style.
    """
    if name.endswith(".json"):
        return OTHER_STYLE
    return next((style for start, style in SAMPLER_STYLES.items() if re.match(start, name.lower())), OTHER_STYLE)


def new_figure(height: float) -> Figure:
    """Returns an empty figure, `height` in inches, narrow enough to be read on a phone."""
    return Figure(figsize=(5.6, height), dpi=DPI, layout="constrained")


def simplify_axes(axis: Axes) -> None:
    """Removes the frame at the top and the right, and draws a faint grid."""
    axis.grid(color=GRID_COLOR, linewidth=0.6)
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
        with matplotlib.rc_context(RC_PARAMS):
            image.savefig(data, format="png", dpi=DPI)
    else:
        image.save(data, "PNG")
    write_atomically(path, data.getvalue())
