"""The reference documents every public name once."""

from __future__ import annotations

import pkgutil
import re

import jacobiflow as jf
from benchmarks.website.pages import ROOT


def test_every_public_name_is_on_one_page():
    pages = [page.read_text() for page in (ROOT / "docs/reference").glob("*.md")]
    shown = [pkgutil.resolve_name(name) for page in pages for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE)]
    assert [name for name in jf.__all__ if sum(found is getattr(jf, name) for found in shown) != 1] == []
