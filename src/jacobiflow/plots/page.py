"""Reports to hand on: tables, pictures and figures in one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from jacobiflow.errors import InputValueError
from jacobiflow.files import json_bytes, write_atomically
from jacobiflow.plots.style import SHEET

_TEMPLATE = "page.html.jinja"
_MARK = b'<meta name="generator" content="jacobiflow '  # in the first bytes of our pages, by which they are recognised
_START = 200  # bytes


@dataclass(frozen=True)
class Table:
    """A table as it is shown.

    **Attributes:** `title`; `columns`, headings, in which a line may end to keep them narrow; `rows` of cells; `words`,
    the columns that hold words, aligned to the left, not numbers; `note`, lines below the table.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = (0,)
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure or a sheet with its caption, which is also the text for those who do not see it."""

    caption: str
    image: Figure | Image.Image


@dataclass(frozen=True)
class Page:
    """What a page shows. All of it is text, whatever characters it holds: nothing becomes markup.

    **Attributes:** `title` and a `summary` of what was done; the words of the `command` line that made it, quoted as a
    shell takes them; facts of the `model`, the `settings` and the `machine` by name, and with "jacobiflow" the version;
    `figures`, a JSON value to download; `tables` and `pictures`, in their order.
    """

    title: str
    summary: str
    command: Sequence[str]
    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    figures: Mapping[str, Any]
    tables: Sequence[Table]
    pictures: Sequence[Picture]


def save_page(page: Page, path: str | Path) -> None:
    """Write a page as one HTML file, which appears whole or not at all. Equal pages are equal files.

    **Raises** `ValueError` where `path` holds something else, see `check_page`.
    """
    check_page(path)
    environment = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    environment.filters["data_uri"] = _data_uri
    template = environment.from_string(files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8"))
    figures = base64.b64encode(json_bytes(page.figures)).decode()
    # A path may have bytes that are not UTF-8.
    write_atomically(path, template.render(page=page, figures=figures).encode(errors="backslashreplace"))


def check_page(path: str | Path) -> None:
    """**Raises** `ValueError` where `path` is there, but is no page that `save_page` wrote."""
    if not os.path.lexists(path):
        return
    ours = False
    if os.path.isfile(path):
        with open(path, "rb") as file:
            ours = _MARK in file.read(_START)
    if not ours:
        raise InputValueError(f"{path}: is not a page that jacobiflow wrote; move it away, or give another file")


def _data_uri(picture: Picture) -> str:
    data = io.BytesIO()
    if isinstance(picture.image, Figure):
        kind = "svg+xml"  # sharp when enlarged or printed
        with matplotlib.rc_context(SHEET):
            picture.image.savefig(data, format="svg", metadata={"Date": None})
    else:
        kind = "png"
        picture.image.save(data, "PNG")
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
