"""Pages read in the site as on GitHub; links lead to pages, to copies of files, or to the repository."""

from __future__ import annotations

import pytest

from benchmarks.website.pages import Pages

REPOSITORY = "https://github.com/owner/name"


@pytest.fixture
def pages(tmp_path):
    root = tmp_path / "root"
    for name in ("README.md", "docs/deep/page.md", "docs/figures/a.png", "src/code.py", "docs/other.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("content")
    return Pages(tmp_path / "site", REPOSITORY, root)


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("README.md", "[a](docs/other.md#part)", "[a](other.md#part)"),
        ("README.md", f"[a]({REPOSITORY}/blob/main/docs/deep/page.md)", "[a](deep/page.md)"),
        ("docs/deep/page.md", "[a](../../README.md)", "[a](../index.md)"),
        ("docs/deep/page.md", "[a](../../src/code.py)", f"[a]({REPOSITORY}/blob/main/src/code.py)"),
        ("docs/deep/page.md", "![a](../figures/a.png)", "![a](../figures/a.png)"),
        ("README.md", '<img src="docs/figures/a.png" width="3">', '<img src="figures/a.png" width="3">'),
        ("README.md", "[a](https://elsewhere.org/x.md) [b](#part)", "[a](https://elsewhere.org/x.md) [b](#part)"),
        ("README.md", "text:\n- one\n  more\n- two\n", "text:\n\n- one\n  more\n- two\n"),
        ("README.md", "`[a](x.md)`\n\n```\n[a](x.md)\n```\n", "`[a](x.md)`\n\n```\n[a](x.md)\n```\n"),
    ],
)
def test_what_is_written(pages, path, text, expected):
    pages.add(path, text)
    assert (pages.site / pages.names[path]).read_text() == expected
    assert (pages.site / "figures/a.png").exists() == ("a.png" in text)


def test_links_to_nothing_are_named(pages):
    pages.add("README.md", "[a](docs/none.md)")
    assert pages.missing == ["README.md links to docs/none.md, which is not there"]
