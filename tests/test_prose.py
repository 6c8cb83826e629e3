"""Figures in sentences are those of the result files, and none is in no sentence that is checked."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import load_script

ROOT = Path(__file__).resolve().parent.parent
prose = load_script("prose")


@pytest.mark.parametrize("page", list(prose.pages()))
def test_figures_in_prose_are_those_of_the_result_files(page: str) -> None:
    text = (ROOT / page).read_text()
    assert prose.written(page, text) == text
    assert prose.uncovered(page, text) == []


def test_figures_that_nobody_checks_are_found() -> None:
    """Not those in code or between marks; the one in a sentence that is known is written anew."""
    page = "docs/architecture.md"
    text = "It is 3.7x, 1e-3 s\nor five minutes; it takes 9.0 times the time of the loop at\nbatch 64: 40\n%.\n\n"
    text += "    9x\n\n`8x`\n<!-- a -->\n7x\n<!-- end of a -->"
    found = ["line 1: 3.7x", "line 1: 1e-3 s", "line 2: five minutes", "line 3: 40 %"]
    assert prose.uncovered(page, text) == found
    assert prose.written(page, text) == text.replace("9.0", f"{prose.windows_by_loop():.1f}")
    with pytest.raises(ValueError, match=r"architecture\.md: 'takes \{:\.1f\} times .*' is there 2 times"):
        prose.written(page, text + text)
