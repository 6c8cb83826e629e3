"""The site builds without a warning, and its search finds."""

from __future__ import annotations

import pytest

pytest.importorskip("zensical", reason="needs Python 3.11")

from benchmarks.website.build import build
from benchmarks.website.links import problems
from tests.helpers.chromium import CHROMIUM, chromium, served


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return build(tmp_path_factory.mktemp("out"))


def test_all_links_resolve(site):
    made_later = ("mermaid.min.js", "live/")  # by `complete`, which needs a network
    assert [line for line in problems(site) if not any(name in line for name in made_later)] == []


def test_commands_have_their_help(site):
    text = (site / "reference/commands/index.html").read_text()
    assert "--tolerance" in text and "jacobiflow sample --model fashion-p2" in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_search_finds(site):
    with served(site) as address, chromium() as browser:
        page = browser.new_page()
        page.goto(address)
        page.locator(".md-search__button").click()
        page.get_by_role("combobox", name="Search").fill("certificate")
        page.locator("[role=option][href*='/solvers/'][href$='#the-certificate']").click()
        page.wait_for_url("**/solvers/*#the-certificate")
