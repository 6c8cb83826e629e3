"""The site builds without a warning, its links lead somewhere, and its search finds."""

from __future__ import annotations

import html
import pkgutil
import re

import pytest

pytest.importorskip("zensical", reason="needs Python 3.11")

import jacobiflow as jf
from jacobiflow.cli.app import app
from tools.chromium import CHROMIUM, chromium, served
from tools.docs.website import ROOT, Pages

PHONE = 390  # pixels
CUT_OFF = "[...document.querySelectorAll('.md-content table')].some(t => t.getBoundingClientRect().right > innerWidth)"
REPOSITORY = "https://github.com/owner/name"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_pages_fit_a_phone_and_ask_no_other_host(site):
    with served(site) as address, chromium() as browser:
        tab = browser.new_page(viewport={"width": PHONE, "height": 800})
        urls = set()
        tab.on("request", lambda request: urls.add(request.url))
        for page in sorted(site.rglob("index.html")):
            tab.goto(f"{address}/{page.parent.relative_to(site)}/")
            assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE, page
            assert not tab.evaluate(CUT_OFF), f"{page}: a table is cut off"
    assert [url for url in urls if not url.startswith(address)] == []


@pytest.mark.slow
def test_the_site_has_an_example_of_each_command(site):
    text = html.unescape((site / "reference/commands/index.html").read_text())
    examples = re.findall(r"^Example: (.*)$", app.generate_docs(), re.MULTILINE)
    assert "--tolerance" in text and len(examples) == sum(name[0] != "-" for name in app.resolved_commands())
    assert [example for example in examples if example not in text] == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_search_finds_a_section(site):
    with served(site) as address, chromium() as browser:
        page = browser.new_page()
        page.goto(address)
        page.locator(".md-search__button").click()
        page.get_by_role("combobox", name="Search").fill("certificate")
        page.locator("[role=option][href*='/solvers/'][href$='#the-certificate']").click()
        page.wait_for_url("**/solvers/*#the-certificate")


@pytest.mark.slow
def test_a_notebook_opens_in_colab(site):
    address = "https://colab.research.google.com/github/jacobiflow/jacobiflow/blob/main/docs/tutorials/zuko.ipynb"
    assert f'href="{address}"' in (site / "tutorials/zuko/index.html").read_text()


@pytest.fixture
def pages(tmp_path):
    root = tmp_path / "root"
    for name in (
        "README.md",
        "docs/page.md",
        "docs/reference/page.md",
        "docs/figures/a.png",
        "src/a.py",
        "docs/other.md",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("content")
    return Pages(tmp_path / "site", REPOSITORY, root)


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("docs/page.md", "[a](other.md#part)", "[a](other.md#part)"),
        ("docs/reference/page.md", "[a](../../README.md)", "[a](../index.md)"),
        ("docs/reference/page.md", "[a](../../src/a.py)", f"[a]({REPOSITORY}/blob/main/src/a.py)"),
        ("docs/page.md", '<img src="figures/a.png#chart" width="3">', '<img src="figures/a.png#chart" width="3">'),
        ("README.md", "[a](docs/other.md) [b](docs/figures/a.png)", "[a](other.md) [b](figures/a.png)"),
        ("README.md", "[a](https://jacobiflow.github.io/jacobiflow/live/)", "[a](live/index.md)"),
        ("docs/reference/page.md", "[a](https://jacobiflow.github.io/jacobiflow/other/#part)", "[a](../other.md#part)"),
        ("docs/page.md", "[a](https://elsewhere.org/x.md) [b](#part)", "[a](https://elsewhere.org/x.md) [b](#part)"),
        ("docs/page.md", "text:\n- one\n  more\n- two\n", "text:\n\n- one\n  more\n- two\n"),
        ("docs/page.md", "`[a](x.md)`\n\n```\n[a](x.md)\n```\n", "`[a](x.md)`\n\n```\n[a](x.md)\n```\n"),
    ],
)
def test_links_of_the_repository_work_in_the_site(pages, path, text, expected):
    pages.add(path, text)
    assert (pages.site / pages.names[path]).read_text() == expected
    assert (pages.site / "figures/a.png").exists() == ("a.png" in text)


def test_links_to_nothing_are_named(pages):
    pages.add("docs/page.md", "[a](none.md)")
    assert pages.missing == ["docs/page.md links to none.md, which is not there"]


def test_every_public_name_is_on_one_page_of_the_reference():
    texts = [page.read_text() for page in (ROOT / "docs/reference").glob("*.md")]
    names = re.findall(r"^::: (\S+)$", "\n".join(texts), re.MULTILINE)
    objects = [pkgutil.resolve_name(name) for name in names]
    assert [name for name in jf.__all__ if sum(each is getattr(jf, name) for each in objects) != 1] == []
