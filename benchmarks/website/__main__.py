"""Gathers the pages, builds the site strictly, and checks its links: `PYTHONPATH=benchmarks python -m website`."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import tomllib

from website.commands import markdown_of_commands
from website.links import problems
from website.notebooks import markdown_of
from website.pages import MERMAID, ROOT, Pages
from website.vendor import vendor_mermaid

_CONFIG = ROOT / "zensical.toml"


def main() -> None:
    """Builds the site; exits 1 with what is wrong with it."""
    listed = re.findall(r'= "([^"]+\.md)"', _CONFIG.read_text())
    project = tomllib.loads(_CONFIG.read_text())["project"]
    source, site = ROOT / project["docs_dir"], ROOT / project["site_dir"]
    for folder in (source, site):
        shutil.rmtree(folder, ignore_errors=True)
    pages = Pages(source, project["extra"]["social"][0]["link"])
    for path, name in pages.names.items():
        if path.endswith(".ipynb"):
            pages.add(path, markdown_of(ROOT / path, (source / name).with_suffix("")))
        else:
            pages.add(path, (ROOT / path).read_text())
    (source / "reference/commands.md").write_text(markdown_of_commands())
    vendor_mermaid(ROOT / "out/vendor" / MERMAID)
    shutil.copyfile(ROOT / "out/vendor" / MERMAID, source / MERMAID)
    shutil.copyfile(ROOT / "docs/site.css", source / "site.css")
    built = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", str(_CONFIG)]
    )
    wrong = [] if built.returncode else problems(site)
    wrong += [
        f"{name} is not in the navigation of {_CONFIG.name}" for name in pages.names.values() if name not in listed
    ]
    print(*wrong, sep="\n", end="\n" * bool(wrong), file=sys.stderr)
    sys.exit(built.returncode or bool(wrong))


if __name__ == "__main__":
    main()
