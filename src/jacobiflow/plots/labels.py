"""Names beside what they name, without overlaps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from jacobiflow.plots.style import readable

_DIRECTIONS = [math.pi * k / 8 for k in (0, 15, 1, 4, 12, 14, 2, 8, 10, 6, 13, 3, 11, 5, 9, 7)]  # right first, then up
_RADII = (7, 10, 14, 20, 28, 38, 50, 65, 85)  # points
_LEADER = 12.0  # points from which on a line leads from a name to its point
_PADDING = 2.0  # points
_TEXT, _OUTSIDE, _LINE = 1e6, 1e6, 12.0  # what it costs to cover a name, leave the panel, or cover a line's pixel


@dataclass(frozen=True)
class Label:
    """A name, for one of the points (x, y) in the panel's data: the only one of a marker, or those along a line."""

    text: str
    points: Sequence[tuple[float, float]]
    color: str


def place_labels(axis: Axes, labels: Sequence[Label]) -> None:
    """Write each name beside one of its points, where it covers the least of names, markers and lines.

    What is drawn in the panel, and its limits, must be complete. A name that finds room only farther away is joined to
    its point by a thin line.
    """
    figure = axis.get_figure(root=True)
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # the layout decides where the points are
    point = figure.dpi / 72  # pixels
    drawn, taken = _drawn(axis, 3 * point), [Text.get_window_extent(text) for text in axis.texts]
    for label in labels:
        written = axis.annotate(
            label.text, label.points[0], xytext=(0, 0), textcoords="offset points", color=readable(label.color),
            arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": label.color, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip
        written.set_in_layout(False)
        size = Text.get_window_extent(written)  # without its leader
        best = min(
            _places(axis, label, size.width, size.height, point),
            key=lambda place: _cost(place, axis.bbox, drawn, taken, point),
        )
        taken.append(best.box)
        _move(written, best, point)


@dataclass(frozen=True)
class _Place:
    """Where a name may be: its box in pixels, its point in data and in pixels, and their distance in points."""

    box: Bbox
    anchor: tuple[float, float]
    pixel: tuple[float, float]
    radius: float


def _places(axis: Axes, label: Label, width: float, height: float, point: float) -> Iterator[_Place]:
    for anchor in label.points:
        x, y = (float(v) for v in axis.transData.transform(anchor))
        for radius in _RADII:
            for angle in _DIRECTIONS:
                right, up = math.cos(angle), math.sin(angle)
                middle = x + radius * point * right + width / 2 * _sign(right)
                center = y + radius * point * up + height / 2 * _sign(up)
                box = Bbox.from_bounds(middle - width / 2, center - height / 2, width, height)
                yield _Place(box, anchor, (x, y), radius)


def _sign(value: float) -> float:
    """-1, 0 or 1, with a wide 0: a name above its point is centred there."""
    return 0.0 if abs(value) < 0.2 else math.copysign(1.0, value)


def _cost(place: _Place, panel: Bbox, drawn: NDArray[np.float64], taken: Sequence[Bbox], point: float) -> float:
    box = place.box.padded(_PADDING * point)
    inside = panel.x0 <= box.x0 and box.x1 <= panel.x1 and panel.y0 <= box.y0 and box.y1 <= panel.y1
    covered = ((drawn > box.min) & (drawn < box.max)).all(axis=1).sum()
    return float(
        place.radius + _LINE * covered + _TEXT * sum(box.overlaps(other) for other in taken) + _OUTSIDE * (not inside)
    )


def line_label(line: Line2D, least: float = -math.inf) -> Label:
    """A line's name, for any of its points but the first, where all may start; those below `least` are not seen."""
    points = [(float(x), float(y)) for x, y in np.asarray(line.get_xydata()) if y >= least]
    return Label(str(line.get_label()), points[1:] or points, to_hex(line.get_color()))


def _drawn(axis: Axes, step: float) -> NDArray[np.float64]:
    """Pixels (n, 2) of the panel's lines and markers, those of lines every `step`."""
    parts = [np.empty((0, 2))]
    for line in axis.get_lines():
        vertices = line.get_transform().transform(np.asarray(line.get_xydata(), dtype=float))
        vertices = vertices[np.isfinite(vertices).all(axis=1)]
        if line.get_marker() not in ("", "None", None):
            parts.append(np.repeat(vertices, 5, axis=0))  # a marker is larger than a pixel of a line
        if line.get_linestyle() not in ("", "None"):
            for start, end in pairwise(vertices):
                count = min(int(np.abs(end - start).max() / step) + 2, 500)
                parts.append(np.linspace(start, end, count))
    return np.concatenate(parts)


def _move(written: Annotation, place: _Place, point: float) -> None:
    """Set the name with its centre in the middle of its box, wherever the layout moves its point."""
    written.xy = place.anchor
    written.set_horizontalalignment("center")
    written.set_verticalalignment("center")
    center = ((place.box.x0 + place.box.x1) / 2, (place.box.y0 + place.box.y1) / 2)
    assert written.arrow_patch is not None
    written.arrow_patch.set_visible(place.radius >= _LEADER)
    written.set_position(((center[0] - place.pixel[0]) / point, (center[1] - place.pixel[1]) / point))
