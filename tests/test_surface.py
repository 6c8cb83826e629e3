"""The public names, parameters and options are those of a committed file."""

from __future__ import annotations

from difflib import unified_diff

import pytest

from tools import surface

REMEDY = """
The public surface is no longer that of tests/public_surface.txt, as these lines show.
- If a name, parameter or option is gone, restore it, with a DeprecationWarning by jacobiflow.utils.deprecation.
- If the change only adds, or the old name still works, run `make surface` and add a line to CHANGELOG.md.
"""


def compare(expected: str, found: str) -> None:
    lines = unified_diff(expected.splitlines(), found.splitlines(), "committed", "now", n=0, lineterm="")
    if difference := "\n".join(lines):
        pytest.fail(f"{REMEDY}\n{difference}", pytrace=False)


def test_the_public_surface_is_the_committed_one() -> None:
    compare(surface.FILE.read_text(), surface.surface())


def test_a_change_is_shown_with_what_to_do() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"(?s)run `make surface`.*\n-plan\(flow\)\n\+plan\(model\)"):
        compare("load(name)\nplan(flow)", "load(name)\nplan(model)")


def test_the_form_of_defaults_types_and_classes() -> None:
    lines = surface.FILE.read_text().splitlines()
    assert "    .CONVERGED" in lines
    assert "class jacobiflow.Segments(count), a jacobiflow.Partition" in lines
    assert "    --batch-size: auto | int; default None" in lines
    assert not [line for line in lines if " at 0x" in line or "torch.nn" in line]
