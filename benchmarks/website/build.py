"""Gathers the pages and builds the site strictly; then brings what is made or fetched elsewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import tomllib

from benchmarks.npm import npm_files
from benchmarks.website.commands import markdown_of_commands
from benchmarks.website.notebooks import markdown_of
from benchmarks.website.pages import MERMAID, ROOT, Pages
from demo import live_page

_CONFIG = ROOT / "docs/zensical.toml"
_MERMAID_VERSION = "12.3.0"
_MERMAID_SHA512 = "4113TdXeLAsMruJ79OpFL5O8+LTFXhQqZ260rF3tgUmiNAtRm4Uume04I+65PRN6yZ69J4f8rVYWW8zRk65UYw=="


def build(out: Path) -> Path:
    """Builds the site of the pages into a folder of `out`, in place of what is there, and returns it.

    Raises:
        CalledProcessError: If Zensical warns of something.
        ValueError: If a link leads nowhere, or a page is not in the navigation.
    """
    project = tomllib.loads(_CONFIG.read_text())["project"]
    source, site = out / project["docs_dir"], out / project["site_dir"]
    for folder in (source, site):
        shutil.rmtree(folder, ignore_errors=True)
    pages = Pages(source, project["extra"]["social"][0]["link"])
    gather(pages)
    listed = re.findall(r'= "([^"]+\.md)"', _CONFIG.read_text())
    wrong = pages.missing + [f"{_CONFIG} does not list {name}" for name in pages.names.values() if name not in listed]
    if wrong:
        raise ValueError("\n".join(wrong))
    config = shutil.copyfile(_CONFIG, out / _CONFIG.name)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", str(config)]
    subprocess.run(command, check=True)
    return site


def gather(pages: Pages) -> None:
    """Writes all pages, and the files that they need, to the folder from which the site is built."""
    for path, name in pages.names.items():
        if path.endswith(".ipynb"):
            pages.add(path, markdown_of(ROOT / path, (pages.site / name).with_suffix("")))
        else:
            pages.add(path, (ROOT / path).read_text())
    (pages.site / "reference/commands.md").write_text(markdown_of_commands())
    shutil.copyfile(ROOT / "docs/site.css", pages.site / "site.css")


def complete(site: Path) -> None:
    """Adds what needs a network or the library: Mermaid, and the page that solves in the browser."""
    (mermaid,) = npm_files("mermaid", _MERMAID_VERSION, _MERMAID_SHA512, [MERMAID])
    shutil.copyfile(mermaid, site / MERMAID)
    live_page.build(site / "live")
