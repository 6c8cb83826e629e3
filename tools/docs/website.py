"""Builds the site into out/site: `python -m tools.docs.website`, or `make docs`.

The Markdown files of the repository link to each other and to sources as GitHub shows them. In the site a link to
another page, or to its address, leads to that page, one to a picture or a file of docs/ to a copy of it, and one to
anything else to the repository. README is the start page.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import tomllib
from nbconvert import MarkdownExporter

from benchmarks import ROOT
from jacobiflow.cli.app import app
from tools.npm import npm_files
from tools.page import live_page

ADDRESS = "https://jacobiflow.github.io/jacobiflow/"
MERMAID, KATEX = "mermaid.min.js", "katex.min.js"
_CONFIG = ROOT / "docs/zensical.toml"
_SCRIPTS = {  # versions, and SHA-512 of the packages
    MERMAID: ("12.3.0", "4113TdXeLAsMruJ79OpFL5O8+LTFXhQqZ260rF3tgUmiNAtRm4Uume04I+65PRN6yZ69J4f8rVYWW8zRk65UYw=="),
    KATEX: ("0.19.1", "jG8uKntjSEcm2EpQOh0XturpPuuC9r3Sq5HLHdsFdWZT27E672SF19QEi+of0/YeOy15lDgRhKvr5614uRrEfA=="),
}
_MATH = r"""<script>
for (const formula of document.querySelectorAll(".math, .arithmatex")) {
  const text = formula.textContent.replace(/^\\\(|\\\)$/g, ""), displayMode = formula.matches(".math");
  katex.render(text, formula, { displayMode, output: "mathml", throwOnError: false });
}
</script>
"""  # MathML, which browsers draw by themselves
_CODE = re.compile(
    r"^(?P<fence>```+|~~~+).*?^(?P=fence)[ ]*$|(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`)", re.DOTALL | re.MULTILINE
)
_BADGE = re.compile(r"^\[!\[.*\n", re.MULTILINE)
_LINK = re.compile(r"(\]\(|\bsrc=\"|\bhref=\")([^)\s\"#]+)([^)\"]*[)\"])")


def build(out: Path) -> Path:
    """Builds the site of the pages into a folder of `out`, in place of its content, and returns it.

    Raises:
        CalledProcessError, ValueError: If a link leads nowhere, or a page is not in the navigation.
    """
    project = tomllib.loads(_CONFIG.read_text())["project"]
    source, site = out / project["docs_dir"], out / project["site_dir"]
    for folder in (source, site):
        shutil.rmtree(folder, ignore_errors=True)
    repository = project["extra"]["social"][0]["link"]
    pages = Pages(source, repository)
    live_page.write_scripts(source / "live")
    for path, name in pages.names.items():
        pages.add(path, _markdown(path, source / name))
    (source / "reference/commands.md").write_text(_commands())
    for name in ("site.css", "site.js"):
        shutil.copyfile(ROOT / "docs" / name, source / name)
    listed = re.findall(r'" = "([^"]+\.md)"', _CONFIG.read_text())
    wrong = pages.missing + [f"{_CONFIG} does not list {name}" for name in pages.names.values() if name not in listed]
    if wrong:
        raise ValueError("\n".join(wrong))
    for script, (version, checksum) in _SCRIPTS.items():
        (file,) = npm_files(script.partition(".")[0], version, checksum, [script])
        shutil.copyfile(file, source / script)
    config = shutil.copyfile(_CONFIG, out / _CONFIG.name)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", str(config)]
    subprocess.run(command, check=True)
    return site


def _markdown(path: str, page: Path) -> str:
    """The Markdown of a file of the repository; the pictures of a notebook are written to a folder beside the page."""
    if path == "README.md":
        return "---\nhide:\n  - toc\n---\n\n" + _BADGE.sub("", (ROOT / path).read_text())
    if not path.endswith(".ipynb"):
        return (ROOT / path).read_text()
    settings = {"output_files_dir": page.stem, "unique_key": page.stem}
    text, resources = MarkdownExporter().from_filename(str(ROOT / path), resources=settings)
    page.with_suffix("").mkdir(parents=True, exist_ok=True)
    for name, data in resources["outputs"].items():
        (page.parent / name).write_bytes(data)
    return text


def _commands() -> str:
    text = app.generate_docs().replace("# jacobiflow", "# Command line", 1)
    text = re.sub(r"## Table of Contents\n\n(- .*\n)+\n", "", text)  # A list of the commands follows.
    return re.sub(r"^Example: (.*)$", r"Example:\n\n```console\n\1\n```", text, flags=re.MULTILINE)


class Pages:
    """The pages of a repository at an address, written to the folder `site`; `missing` collects links to nothing."""

    def __init__(self, site: Path, repository: str, root: Path = ROOT) -> None:
        self.site, self.repository, self.root, docs = site, repository, root, root / "docs"
        self.missing: list[str] = []
        self.names = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}  # in the site, by path in the repository
        for page in root.glob("tools/page/static/*.md"):
            self.names[str(page.relative_to(root))] = f"live/{page.name}"
        for card in (root / "src/jacobiflow/bundled").glob("*/README.md"):
            self.names[str(card.relative_to(root))] = f"models/{card.parent.name}.md"
        for page in (*docs.glob("*.md"), *docs.glob("reference/*.md"), *docs.glob("tutorials/*.ipynb")):
            self.names[str(page.relative_to(root))] = str(page.relative_to(docs).with_suffix(".md"))
        self.names.pop("docs/architecture.md", None)  # Contributors read it in the repository.

    def add(self, path: str, text: str) -> None:
        """Writes the page of the file `path` of the repository, whose Markdown is `text`."""
        page = self.site / self.names[path]
        page.parent.mkdir(parents=True, exist_ok=True)

        def change(part: str) -> str:
            return _LINK.sub(lambda link: f"{link[1]}{self._target(path, link[2])}{link[3]}", _spaced(part))

        text = _outside_code(text, change)
        if "```mermaid" in text:  # a copy of Mermaid, so that Zensical fetches none
            text += f'\n<script src="{os.path.relpath(MERMAID, os.path.dirname(self.names[path]))}"></script>\n'
        if "```math" in text or "$" in text:
            text += f'\n<script src="{os.path.relpath(KATEX, os.path.dirname(self.names[path]))}"></script>\n{_MATH}'
        page.write_text(text)

    def _target(self, path: str, target: str) -> str:
        """The target in the site of a link in the file `path`."""
        here = os.path.dirname(self.names[path])
        if target.startswith(ADDRESS):
            page = target.removeprefix(ADDRESS).rstrip("/")
            return os.path.relpath(f"{page}/index.md" if page == "live" else f"{page}.md", here)
        beside = self.site / here / target  # if it is a picture of a notebook, or a script
        if ":" in target or (not target.startswith("..") and beside.is_file()):
            return target
        linked = os.path.normpath(os.path.join(os.path.dirname(path), target))
        if linked in self.names:
            return os.path.relpath(self.names[linked], here)
        if linked.startswith("docs/") and not linked.endswith(".md") and (self.root / linked).is_file():
            copy = linked.removeprefix("docs/")
            (self.site / copy).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.root / linked, self.site / copy)
            return os.path.relpath(copy, here)
        if not (self.root / linked).exists():
            self.missing.append(f"{path} links to {target}, which is not there")
        return f"{self.repository}/blob/main/{linked}"


def _spaced(part: str) -> str:
    """Markdown with the empty line between a paragraph and a list that GitHub does not need."""
    return re.sub(r"^(?!\s|[-*+] |[#|>])(.+\n)(?=[-*+] )", r"\1\n", part, flags=re.MULTILINE)


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    """Markdown with all but its code changed."""
    parts, end = [], 0
    for code in _CODE.finditer(text):
        parts += [change(text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, change(text[end:])])


if __name__ == "__main__":
    build(ROOT / "out")
