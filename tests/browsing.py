"""What a reader sees of an HTML file: opened in Chromium, on a desktop and on a phone."""

from __future__ import annotations

import base64
from pathlib import Path
from types import SimpleNamespace

import pytest
from chromium import CHROMIUM, chromium

SEEN = """() => { const text = element => element.textContent; return {
    title: document.title,
    command: text(document.querySelector("pre")),
    facts: Object.fromEntries([...document.querySelectorAll("dt")].map(e => [text(e), text(e.nextSibling)])),
    tables: [...document.querySelectorAll("tbody")].map(e => [...e.rows].map(row => [...row.cells].map(text))),
    images: [...document.images].map(image => image.naturalWidth),
    json: document.querySelector("a[download]").href.split(",")[1],
}}"""


def read_page(path: Path) -> SimpleNamespace:
    """Its title, command, facts, cells of tables, widths of images, and figures as bytes.

    Fails where the page asks for anything but its file, complains, runs a script, or is wider than its window.
    """
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    address, requests, messages = path.resolve().as_uri(), [], []
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.goto(address)
        seen = page.evaluate(SEEN)
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("document.scripts.length") == 0
    assert messages == []
    assert [url for url in requests if not url.startswith("data:")] == [address]
    assert min(seen["images"]) > 0
    return SimpleNamespace(**seen, figures=base64.b64decode(seen["json"]))
