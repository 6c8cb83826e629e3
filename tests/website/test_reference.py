"""The reference documents every public name once."""

from __future__ import annotations

import re
from collections import Counter

import jacobiflow as jf
from website.pages import ROOT


def test_every_public_name_is_on_one_page():
    pages = (ROOT / "docs/reference").glob("*.md")
    shown = Counter(name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE))
    assert {name.removeprefix("jacobiflow.") for name in shown} >= set(jf.__all__)
    assert set(shown.values()) == {1}
