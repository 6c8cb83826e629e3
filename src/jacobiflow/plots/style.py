"""What all pictures share: colours, the style of a sampler, axes, and files."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from jacobiflow.files import write_atomically

# The colours of Okabe and Ito, which colour-blind readers can tell from each other.
BLUE, ORANGE, GREEN, PINK, SKY, RED, BLACK, OLIVE = COLORS = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000", "#b8a800",
)  # fmt: skip
GREY = "#8c8c8c"
_MARK = {"Software": "jacobiflow"}  # text in our PNGs, by which they are recognised
ORDERED = matplotlib.colormaps["viridis"]


@dataclass(frozen=True)
class Style:
    """How the points of a sampler are drawn: a colour, a marker, and whether the marker is filled."""

    color: str
    marker: str
    filled: bool = True

    @property
    def fillstyle(self) -> str:
        """Matplotlib's name for `filled`."""
        return "full" if self.filled else "none"


# By the start of a sampler's name, in lower case.
_STYLES = {
    r"auto\b": Style(BLUE, "o"),
    r"original|growing cache|full passes": Style(GREY, "D"),
    r"sequential": Style(BLACK, "s"),
    r"jacobi\b": Style(ORANGE, "v"),
    r"gs-jacobi|\[": Style(RED, "P"),
    r"window\b": Style(GREEN, "^"),
    r"selective jacobi": Style(PINK, "X"),
    r"starflow": Style(SKY, "*"),
}
_OTHER = Style(OLIVE, "p")
_MARKERS = "".join(style.marker for style in (*_STYLES.values(), _OTHER))


def sampler_style(name: str) -> Style:
    """The style of a sampler or strategy of that name, the same in every figure.

    Strategies that differ in settings only, such as "window:32" and "window:64", share a style.
    """
    if name.endswith(".json"):
        return _OTHER
    return next((style for start, style in _STYLES.items() if re.match(start, name.lower())), _OTHER)


def distinct_styles(names: Iterable[str]) -> dict[str, Style]:
    """A style for each name, with the colour of `sampler_style`; names that would share a marker get different ones."""
    styles: dict[str, Style] = {}
    for name in dict.fromkeys(names):
        style = sampler_style(name)
        first = _MARKERS.index(style.marker)
        choices = [
            replace(style, marker=marker, filled=filled)
            for filled in (True, False)
            for marker in _MARKERS[first:] + _MARKERS[:first]
        ]
        styles[name] = next((choice for choice in choices if choice not in styles.values()), style)
    return styles


def escape(name: str) -> str:
    """A name in which matplotlib finds no mathematics."""
    return name.replace("$", r"\$")


def clear(axis: Axes, grid: bool = True) -> None:
    """Draw no frame at the top and the right, and a faint grid."""
    if grid:
        axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def plain_ticks(axis: Axis, subs: Sequence[float] = (1, 2, 5)) -> None:
    """Label a logarithmic axis with plain numbers, at `subs` times the powers of ten."""
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def save_png(image: Image.Image | Figure, path: str | Path) -> None:
    """Write a PNG that says it is ours, see `check_picture`; the file appears whole or not at all.

    **Raises** `ValueError` where `path` holds something else.
    """
    check_picture(path)
    data = io.BytesIO()
    if isinstance(image, Figure):
        image.savefig(data, format="png", dpi=130, metadata=_MARK)
    else:
        text = PngInfo()
        for name, value in _MARK.items():
            text.add_text(name, value)
        image.save(data, "PNG", pnginfo=text)
    write_atomically(path, data.getvalue())


def check_picture(path: str | Path) -> None:
    """**Raises** `ValueError` where `path` is there, but is no picture that `save_png` wrote."""
    if not os.path.lexists(path):
        return
    try:
        with Image.open(path) as image:
            ours = _MARK.items() <= getattr(image, "text", {}).items()
    except (OSError, ValueError, Image.DecompressionBombError):
        ours = False
    if not ours:
        raise ValueError(f"{path}: is not a picture that jacobiflow made; move it away, or give another folder")
