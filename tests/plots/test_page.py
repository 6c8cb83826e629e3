"""Pages: text stays text, and what is not ours is not replaced."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from jacobiflow.plots import Page, Picture, Table, save_page

HOSTILE = """</title></style></pre>--><script>alert('1')</script><b onclick="alert(2)">&amp;{{ 7 * 7 }}{% raw %}"""


def page(text: str) -> Page:
    """A page that has `text` wherever text may be."""
    table = Table(text, (text, text), [(text, text)], note=text)
    pictures = [Picture(text, Figure()), Picture(text, Image.new("RGB", (2, 2)))]
    facts = {text: text}
    return Page(text, text, [text], facts, facts, {"jacobiflow": text, **facts}, {text: text}, [table], pictures)


class Reader(HTMLParser):
    """The tags of a page with the names of their attributes, and its texts."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, ...]] = []
        self.texts: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, *(name for name, _ in attrs)))
        self.texts += [value for name, value in attrs if value is not None and name in ("alt", "aria-label")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def read(text: str, path: Path) -> Reader:
    save_page(page(text), path)
    return Reader(path.read_text())


def test_no_text_becomes_markup(tmp_path: Path) -> None:
    plain, hostile = read("text", tmp_path / "a.html"), read(HOSTILE, tmp_path / "b.html")
    assert hostile.tags == plain.tags
    assert hostile.texts == [text if text != "text" else HOSTILE for text in plain.texts]
    assert plain.texts.count("text") > 15


def test_a_page_of_ours_is_replaced_by_the_same_bytes_and_nothing_else_is(tmp_path: Path) -> None:
    path = tmp_path / "p.html"
    save_page(page("one"), path)
    first = path.read_bytes()
    save_page(page("two"), path)
    save_page(page("one"), path)
    assert path.read_bytes() == first
    for foreign in (b"", b"<!doctype html>\n<html><head><title>jacobiflow</title></head></html>"):
        path.write_bytes(foreign)
        with pytest.raises(ValueError, match=r"p\.html: is not a page that jacobiflow wrote"):
            save_page(page("one"), path)
        assert path.read_bytes() == foreign
    broken = replace(page("one"), figures={"one": object()})
    with pytest.raises(TypeError):
        save_page(broken, tmp_path / "new.html")
    assert list(tmp_path.iterdir()) == [path]
