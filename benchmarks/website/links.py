"""Checks a built site: every link, anchor, picture, script and style is there; nothing is loaded from another host.

A page has one title.
"""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    """The anchors of a page, what it links to, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.titles = 0
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        self.titles += tag == "h1"
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload"):
            self.loaded.append(values.get("href", ""))
        elif "src" in values:
            self.loaded.append(values["src"])


def problems(site: Path) -> list[str]:
    """Lists the problems in the pages of the folder `site`; links to other hosts are not followed."""
    pages = {page: _Page(page.read_text()) for page in sorted(site.rglob("*.html"))}
    problems_of_pages = []
    for page, content in pages.items():
        if page.name == "404.html":  # its links are absolute, for it is shown in place of any page
            continue
        name = page.relative_to(site)
        problems_of_pages += [f"{name} has {content.titles} titles"] * (content.titles != 1)
        for target in content.links + content.loaded:
            parts = urlsplit(target)
            if parts.scheme in ("http", "https"):
                problems_of_pages += [f"{name} loads {target}"] * (target in content.loaded)
            elif not parts.scheme:
                file = (page.parent / unquote(parts.path)).resolve() if parts.path else page
                file = file / "index.html" if file.is_dir() else file
                if not file.exists():
                    problems_of_pages.append(f"{name}: {target} is not there")
                elif parts.fragment and file in pages and unquote(parts.fragment) not in pages[file].anchors:
                    problems_of_pages.append(f"{name}: {target} has no such anchor")
    return problems_of_pages
