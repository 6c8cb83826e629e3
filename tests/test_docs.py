"""The examples in docs run, and print what they say they print; tests/test_wheel.py runs those of README.

Commands are parsed as the command line does, and not run: they name files that nobody has here.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import statistics
from pathlib import Path

import pytest
from running import load_script
from typer.exceptions import TyperException
from typer.main import get_command

from jacobiflow.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = [
    (path, match.group(1))
    for path in sorted((ROOT / "docs").glob("*.md"))
    if path.name != "extending.md"
    for match in re.finditer(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
]

PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
# In a block a command is a line, with what comes before its name: a launcher, variables. In a sentence it may lack
# options that it needs.
IN_BLOCKS = re.compile(r"^ *(?:\w+=\w+ )*(?:torchrun .* -- )?(jacobiflow \w.*)$", re.MULTILINE)
IN_SENTENCES = re.compile(r"`(jacobiflow \w[^`|\\]*)")


@pytest.mark.parametrize("page", [pytest.param(page.read_text(), id=page.name) for page in PAGES])
def test_the_command_line_takes_the_commands(page):
    group = get_command(app)
    for pattern in (IN_BLOCKS, IN_SENTENCES):
        for text in pattern.findall(page.replace("\\\n", " ")):
            name, command, words = group.resolve_command(None, shlex.split(text, comments=True)[1:])
            try:
                command.make_context(name, words)
            except TyperException as error:
                lacks = pattern is IN_SENTENCES and str(error).startswith("Missing")
                assert lacks, f"{text}: {error.format_message()}"


@pytest.mark.parametrize(("path", "code"), EXAMPLES, ids=[path.name for path, _ in EXAMPLES])
def test_example_prints_what_it_says(path, code, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, path.name, "exec"), {"__name__": "example"})
    expected = re.findall(r"^# (.*)$", code.split("print(")[-1], re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == expected


def test_there_are_examples():
    assert {path.name for path, _ in EXAMPLES} >= {"flows.md", "your_own_block.md"}


def test_the_extensions_are_those_that_the_tests_run():
    shown = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
    files = sorted((ROOT / "tests" / "extending").glob("[!t]*.py"))
    assert sorted(shown) == sorted(path.read_text() for path in files)
    assert all(len(text.splitlines()) < 80 for text in shown)


def test_links_and_pictures_exist():
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "src").rglob("README.md")):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path}: {target}"


@pytest.mark.parametrize(
    ("page", "script"),
    [
        ("README.md", "readme"),
        ("docs/performance.md", "performance_page"),
        ("docs/calibration.md", "calibration_page"),
        ("docs/flows.md", "flows_page"),
        ("docs/evaluation.md", "evaluation_page"),
        ("docs/reliability.md", "reliability_page"),
        ("docs/architecture.md", "architecture_page"),
    ],
)
def test_pages_show_the_result_files(page, script):
    text = (ROOT / page).read_text()
    parts = load_script(script).parts()
    assert parts
    for name, part in parts.items():
        marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
        assert [text.count(mark) for mark in marks] == [1, 1]
        assert text.partition(marks[0])[2].partition(marks[1])[0].strip() == part.strip()


@pytest.mark.parametrize("name", ["digits-maf", "digits-p1", "emoji-p2", "fashion-p2"])
def test_model_cards_are_made_of_the_result_files_and_their_code_runs(name, capsys):
    folder = ROOT / "src" / "jacobiflow" / "models" / name
    text = (folder / "README.md").read_text()
    assert text == load_script("model_cards").card(name)
    _, front, body = text.split("---\n", 2)
    for line in ("license: apache-2.0", "library_name: jacobiflow", "pipeline_tag: unconditional-image-generation"):
        assert f"{line}\n" in front
    assert all(f"\n## {title}\n" in body for title in ("Intended use", "Training and figures", "Speed", "Limits"))
    (code,) = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    exec(compile(code, name, "exec"), {})
    assert capsys.readouterr().out.strip() == re.findall(r"# (\(.*\)),", code)[0]
    recommended = json.loads((ROOT / "docs" / "results" / f"{name}-search.json").read_text())["recommended"]
    assert json.loads((folder / "config.json").read_text()).get("recommended", {"guidance": None, "denoise": 0.0}) == (
        recommended
    )


@pytest.mark.parametrize("by", ["tokens", "batch", "tolerance"])
def test_exponents_of_growth_are_slopes_of_logarithms(by):
    found = json.loads((ROOT / "docs" / "results" / "growth.json").read_text())[f"by_{by}"]
    assert set(found["exponents"]) == {row["sampler"] for row in found["rows"]}
    for sampler, fitted in found["exponents"].items():
        own = [row for row in found["rows"] if row["sampler"] == sampler]
        assert len({row[by] for row in own}) == len(own) >= 3
        x = [math.log(row[by]) for row in own]
        for measure, exponent in fitted.items():
            slope, _ = statistics.linear_regression(x, [math.log(row[measure]) for row in own])
            assert exponent == pytest.approx(slope, abs=1e-9)
