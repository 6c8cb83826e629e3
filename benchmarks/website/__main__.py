"""Builds the site into out/site: `python -m benchmarks.website`. Exits 1 with what is wrong with it."""

import sys

from benchmarks.website.build import build, complete
from benchmarks.website.links import problems
from benchmarks.website.pages import ROOT

if __name__ == "__main__":
    site = build(ROOT / "out")
    complete(site)
    wrong = problems(site)
    print(*wrong, sep="\n", end="\n" * bool(wrong), file=sys.stderr)
    sys.exit(bool(wrong))
