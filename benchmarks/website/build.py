"""Gathers the pages, builds the site strictly, and checks it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import tomllib

from website.commands import markdown_of_commands
from website.formulas import typeset
from website.links import problems
from website.notebooks import markdown_of
from website.pages import MERMAID, ROOT, Pages
from website.vendor import vendor_mermaid

_CONFIG = ROOT / "docs/zensical.toml"


def build(out: Path) -> list[str]:
    """Builds the site into the folder `site` of `out`, in place of what is there; returns what is wrong with it."""
    project = tomllib.loads(_CONFIG.read_text())["project"]
    source, site = out / project["docs_dir"], out / project["site_dir"]
    for folder in (source, site):
        shutil.rmtree(folder, ignore_errors=True)
    pages = Pages(source, project["extra"]["social"][0]["link"])
    gather(pages)
    config = shutil.copyfile(_CONFIG, out / _CONFIG.name)
    made = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", str(config)]
    if subprocess.run(made).returncode:
        return ["zensical found something wrong, see above"]
    typeset(site)
    listed = re.findall(r'= "([^"]+\.md)"', _CONFIG.read_text())
    forgotten = [f"{_CONFIG.name} does not list {name}" for name in pages.names.values() if name not in listed]
    return problems(site) + forgotten


def gather(pages: Pages) -> None:
    """Writes all pages, and the files that they need, to the folder from which the site is built."""
    for path, name in pages.names.items():
        if path.endswith(".ipynb"):
            pages.add(path, markdown_of(ROOT / path, (pages.site / name).with_suffix("")))
        else:
            pages.add(path, (ROOT / path).read_text())
    (pages.site / "reference/commands.md").write_text(markdown_of_commands())
    shutil.copyfile(ROOT / "docs/site.css", pages.site / "site.css")
    shutil.copyfile(vendor_mermaid(ROOT / "out/vendor" / MERMAID), pages.site / MERMAID)
