"""Builds the site into out/site: `python -m benchmarks.website.build`, or `make docs`. Exits 1 if it has problems."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import tomllib
from nbconvert import MarkdownExporter

from benchmarks.common import ROOT
from benchmarks.npm import npm_files
from benchmarks.website.links import problems
from benchmarks.website.pages import MERMAID, Pages
from demo import live_page

_CONFIG = ROOT / "docs/zensical.toml"
_MERMAID_VERSION = "12.3.0"
_MERMAID_SHA512 = "4113TdXeLAsMruJ79OpFL5O8+LTFXhQqZ260rF3tgUmiNAtRm4Uume04I+65PRN6yZ69J4f8rVYWW8zRk65UYw=="


def build(out: Path) -> Path:
    """Builds the site of the pages into a folder of `out`, in place of its content, and returns it.

    Raises:
        CalledProcessError: If Zensical warns of something.
        ValueError: If a link leads nowhere, or a page is not in the navigation.
    """
    project = tomllib.loads(_CONFIG.read_text())["project"]
    source, site = out / project["docs_dir"], out / project["site_dir"]
    for folder in (source, site):
        shutil.rmtree(folder, ignore_errors=True)
    pages = Pages(source, project["extra"]["social"][0]["link"])
    for path, name in pages.names.items():
        text = _notebook(ROOT / path, source / name) if path.endswith(".ipynb") else (ROOT / path).read_text()
        pages.add(path, text)
    (source / "reference/commands.md").write_text(_commands())
    shutil.copyfile(ROOT / "docs/site.css", source / "site.css")
    listed = re.findall(r'= "([^"]+\.md)"', _CONFIG.read_text())
    wrong = pages.missing + [f"{_CONFIG} does not list {name}" for name in pages.names.values() if name not in listed]
    if wrong:
        raise ValueError("\n".join(wrong))
    config = shutil.copyfile(_CONFIG, out / _CONFIG.name)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", str(config)]
    subprocess.run(command, check=True)
    return site


def _notebook(path: Path, page: Path) -> str:
    """A notebook as Markdown; its pictures are written to a folder beside the page."""
    settings = {"output_files_dir": page.stem, "unique_key": path.stem}
    text, resources = MarkdownExporter().from_filename(str(path), resources=settings)
    page.with_suffix("").mkdir(parents=True, exist_ok=True)
    for name, data in resources["outputs"].items():
        (page.parent / name).write_bytes(data)
    return str(text)


def _commands() -> str:
    """The help of every command as Markdown."""
    command = [sys.executable, "-m", "typer", "jacobiflow.cli.app", "utils", "docs", "--name", "jacobiflow"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    text = text.replace("# `jacobiflow`", "# Command line", 1)
    text = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+\n", "", text)  # whose descriptions are cut; their sections follow
    text = re.sub(
        r"^(Example|Examples): (.*?)\n\n", r"\1:\n\n```console\n\2\n```\n\n", text, flags=re.DOTALL | re.MULTILINE
    )
    return re.sub(r"^\*\*(\w+)\*\*:", r"\1:", text, flags=re.MULTILINE)


def main() -> None:
    """Builds the site, with Mermaid and the page that solves in the browser, and checks its links."""
    site = build(ROOT / "out")
    (mermaid,) = npm_files("mermaid", _MERMAID_VERSION, _MERMAID_SHA512, [MERMAID])
    shutil.copyfile(mermaid, site / MERMAID)
    live_page.build(site / "live")
    if wrong := problems(site):
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
