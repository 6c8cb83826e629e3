"""Formulas of the built pages as MathML, which browsers show without a script."""

from __future__ import annotations

import html
import re
from pathlib import Path

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def typeset(site: Path) -> None:
    """Turns the TeX of all pages of the folder `site` into MathML."""
    for page in site.rglob("*.html"):
        text = page.read_text()
        if _FORMULA.search(text):
            page.write_text(_FORMULA.sub(_mathml, text))


def _mathml(formula: re.Match[str]) -> str:
    return convert(html.unescape(formula[2]), display="inline" if formula[1] == "span" else "block")
