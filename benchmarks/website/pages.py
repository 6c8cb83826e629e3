"""Gathers the pages of the site in one folder, with links that work there.

The Markdown files of the repository link to each other and to sources as GitHub shows them. In the site a link to
another page leads to that page, one to a picture or a file of docs/ to a copy of it, and one to anything else to the
repository.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import ROOT

MERMAID = "mermaid.min.js"
_CODE = re.compile(
    r"^(?P<fence>```+|~~~+).*?^(?P=fence)[ ]*$|(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`)", re.DOTALL | re.MULTILINE
)
_LINK = re.compile(r"(?P<before>\]\(|\bsrc=\"|\bhref=\")(?P<target>[^)\s\"#]+)(?P<after>[^)\"]*[)\"])")


def page_names(root: Path = ROOT) -> dict[str, str]:
    """The name of each page in the site by its path in the repository."""
    pages = {"README.md": "index.md"}
    for page in sorted(root.glob("[CS]*.md")):  # CHANGELOG, CONTRIBUTING, SECURITY
        pages[page.name] = page.name.lower()
    for card in sorted((root / "src/jacobiflow/models").glob("*/README.md")):
        pages[str(card.relative_to(root))] = f"models/{card.parent.name}.md"
    docs = root / "docs"
    for page in sorted([*docs.rglob("*.md"), *docs.rglob("*.ipynb")]):
        pages[str(page.relative_to(root))] = str(page.relative_to(docs).with_suffix(".md"))
    return pages


class Pages:
    """The pages of a repository at an address, written to the folder `site`; `missing` collects links to nothing."""

    def __init__(self, site: Path, repository: str, root: Path = ROOT) -> None:
        self.site, self.root = site, root
        self.names = page_names(root)
        self.missing: list[str] = []
        self._tree = f"{repository}/blob/main/"
        raw = repository.replace("github.com", "raw.githubusercontent.com") + "/main/"
        self._own = re.compile("|".join(map(re.escape, (self._tree, f"{repository}/tree/main/", raw))))

    def add(self, path: str, text: str) -> None:
        """Writes the page of the file `path` of the repository, whose Markdown is `text`."""
        page = self.site / self.names[path]
        page.parent.mkdir(parents=True, exist_ok=True)
        moved = outside_code(text, lambda part: _LINK.sub(lambda link: self._moved(path, link), _spaced(part)))
        if "```mermaid" in text:  # a copy of Mermaid, so that Zensical fetches none
            moved += f'\n<script src="{os.path.relpath(MERMAID, os.path.dirname(self.names[path]))}"></script>\n'
        page.write_text(moved)

    def _moved(self, path: str, link: re.Match[str]) -> str:
        target = self._target(path, link["target"])
        return link[0] if target is None else f"{link['before']}{target}{link['after']}"

    def _target(self, path: str, target: str) -> str | None:
        """Returns the target in the site of a link in the file `path`; `None` leaves the link as it is."""
        match = self._own.match(target)
        if match is None and (":" in target or target.startswith("/")):
            return None
        linked = target[match.end() :] if match else os.path.normpath(os.path.join(os.path.dirname(path), target))
        here = os.path.dirname(self.names[path])
        if linked in self.names:
            return os.path.relpath(self.names[linked], here)
        if linked.startswith("docs/") and (self.root / linked).is_file():
            copy = linked.removeprefix("docs/")
            (self.site / copy).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.root / linked, self.site / copy)
            return os.path.relpath(copy, here)
        if (self.site / here / target).is_file():  # a picture of a notebook, written beside its page
            return None
        if not (self.root / linked).exists():
            self.missing.append(f"{path} links to {target}, which is not there")
        return self._tree + linked


def _spaced(part: str) -> str:
    """Markdown with the empty line between a paragraph and a list that GitHub does not need."""
    return re.sub(r"^(?!\s|[-*+] |[#|>])(.+\n)(?=[-*+] )", r"\1\n", part, flags=re.MULTILINE)


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """Markdown with what is not code changed."""
    parts, end = [], 0
    for code in _CODE.finditer(text):
        parts += [change(text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, change(text[end:])])
