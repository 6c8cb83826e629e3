"""The site builds without a warning, and its search finds."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import pytest

pytest.importorskip("zensical", reason="needs Python 3.11")

from website.build import build
from website.screenshots import CHROMIUM, chromium, served


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    try:
        assert build(out) == []
    except URLError as error:
        pytest.skip(f"Mermaid cannot be fetched: {error}")
    return out / "site"


def test_commands_have_their_help(site):
    text = (site / "reference/commands/index.html").read_text()
    assert "--tolerance" in text and "jacobiflow sample --model fashion-p2" in text


@pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="no Chromium")
def test_search_finds(site):
    with served(site) as address, chromium() as browser:
        page = browser.new_page()
        page.goto(address)
        page.locator(".md-search__button").click()
        page.get_by_role("combobox", name="Search").fill("certificate")
        page.get_by_role("option", name="The certificate", exact=True).click()
        page.wait_for_url("**/solvers/*#the-certificate")
