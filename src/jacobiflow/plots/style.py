"""The style sheet of all pictures: sizes, the one font, the colour of every sampler, axes, and files."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image, ImageFont
from PIL.PngImagePlugin import PngInfo

from jacobiflow.errors import InputValueError
from jacobiflow.files import write_atomically

WIDTH = 8.3  # inches: a page shows a figure 830 pixels wide, so that 10 points are 14 pixels there
FONT_SIZE = 10  # points, of all text in figures
DPI = 200
SHEET: Any = {  # whose type would be matplotlib's, which lists every setting
    "font.family": "DejaVu Sans",
    "font.size": FONT_SIZE,
    "axes.titlesize": FONT_SIZE,
    "axes.labelsize": FONT_SIZE,
    "xtick.labelsize": FONT_SIZE,
    "ytick.labelsize": FONT_SIZE,
    "legend.fontsize": FONT_SIZE,
    "legend.frameon": False,
    "figure.titlesize": FONT_SIZE,
    "figure.labelsize": FONT_SIZE,
    "lines.linewidth": 1.6,
    "lines.markersize": 6,
    "axes.linewidth": 0.8,
    "svg.hashsalt": "jacobiflow",  # the same file each time
}  # matplotlib's settings for every figure, see `styled`

INK, FAINT, PAPER = "#222222", "#e6e6e6", "#ffffff"
FINAL, WAITING = "#a9b5c4", "#f2f2f2"  # of tokens; those that are being swept have their sampler's colour
TOUGH, EASY = "#3d4a5c", "#a9b5c4"  # of blocks
ORDERED = matplotlib.colormaps["viridis"]  # of what comes in an order, such as segments
_EXACT, _NEAR = 24, 40  # colours of an animation
_PACE, _HOLD = 70, 3000  # milliseconds
_MARK = {"Software": "jacobiflow"}  # text in our PNGs, by which they are recognised

P = ParamSpec("P")
R = TypeVar("R")


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


# By the start of a sampler's name, in lower case. The colours are of different lightness, for print in grey, and
# colour-blind readers can tell all of them from each other.
SAMPLERS = {
    r"auto\b": Style("#00519e", "o"),
    r"original|growing cache|full passes": Style("#959595", "D"),
    r"sequential": Style("#000000", "s"),
    r"jacobi\b": Style("#fba652", "v"),
    r"gs-jacobi|\[": Style("#c13a0f", "P"),
    r"window\b": Style("#1f8f54", "^"),
    r"selective jacobi": Style("#580656", "X"),
    r"starflow": Style("#57adf3", "*"),
}
OTHER = Style("#e5cd07", "p")
_MARKERS = "".join(style.marker for style in (*SAMPLERS.values(), OTHER))


def sampler_style(name: str) -> Style:
    """The style of a sampler or strategy of that name, the same in every figure.

    Strategies that differ in settings only, such as "window:32" and "window:64", share a style.
    """
    if name.endswith(".json"):
        return OTHER
    return next((style for start, style in SAMPLERS.items() if re.match(start, name.lower())), OTHER)


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """A function that draws, under the settings of the style sheet; those of the caller stay as they are."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        with matplotlib.rc_context(SHEET):
            return draw(*args, **kwargs)

    return drawn


def new_figure(height: float) -> Figure:
    """An empty figure of the one width, `height` in inches, whose parts make room for each other."""
    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def readable(color: str) -> str:
    """The colour, dark enough for text on white: a contrast of 4.5 at the least."""
    red, green, blue = to_rgb(color)
    light = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    factor = min(1.0, (0.17 / max(light, 1e-9)) ** (1 / 2.2))
    return str(to_hex((factor * red, factor * green, factor * blue)))


@cache
def font(size: float) -> ImageFont.FreeTypeFont:
    """The font of the figures, for sheets; `size` in pixels."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


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
        axis.grid(color=FAINT, linewidth=0.6)
        axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=FONT_SIZE)  # of ticks that are not made yet, too


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
        with matplotlib.rc_context(SHEET):
            image.savefig(data, format="png", dpi=DPI, metadata=_MARK)
    else:
        text = PngInfo()
        for name, value in _MARK.items():
            text.add_text(name, value)
        image.save(data, "PNG", pnginfo=text)
    write_atomically(path, data.getvalue())


def save_gif(frames: Sequence[Image.Image], path: str | Path) -> None:
    """Write frames as a GIF of 14 a second, which starts again after three seconds of the last one; see `save_png`."""
    check_picture(path)
    palette = _palette([frames[0], frames[len(frames) // 2], frames[-1]])
    first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    data = io.BytesIO()
    first.save(
        data, "GIF", save_all=True, append_images=others, loop=0, comment=_MARK["Software"].encode(),
        duration=[*[_PACE] * len(others), _HOLD],
    )  # fmt: skip
    write_atomically(path, data.getvalue())


def _palette(frames: Sequence[Image.Image]) -> Image.Image:
    """Colours for all frames, so that what differs between two of them is what has changed: the commonest as they are,
    which are those of flat areas, and others that come near to the rest.
    """
    wide = Image.new("RGB", (frames[0].width, frames[0].height * len(frames)))
    for i, frame in enumerate(frames):
        wide.paste(frame, (0, i * frame.height))
    counted: list[Any] = wide.getcolors(wide.width * wide.height) or []
    common = [color for _, color in sorted(counted, reverse=True)[:_EXACT]]
    palette = Image.new("P", (1, 1))
    palette.putpalette([*(value for color in common for value in color), *(wide.quantize(_NEAR).getpalette() or [])])
    return palette


def check_picture(path: str | Path) -> None:
    """**Raises** `ValueError` where `path` is there, but is no picture that `save_png` or `save_gif` wrote."""
    if not os.path.lexists(path):
        return
    try:
        with Image.open(path) as image:
            commented = image.info.get("comment") == _MARK["Software"].encode()
            ours = commented or _MARK.items() <= getattr(image, "text", {}).items()
    except (OSError, ValueError, Image.DecompressionBombError):
        ours = False
    if not ours:
        raise InputValueError(f"{path}: is not a picture that jacobiflow made; move it away, or give another folder")
