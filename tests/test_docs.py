"""The examples in docs run, and print what they say they print; tests/test_wheel.py runs those of README.

Commands are parsed as the command line does, and not run: they name files that nobody has here.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.exceptions import TyperException
from typer.main import get_command

from benchmarks import render
from jacobiflow.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = [
    (path, match.group(1))
    for path in sorted((ROOT / "docs").glob("*.md"))
    if path.name != "extending.md"
    for match in re.finditer(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
]

WORDS = "two|three|four|five|six|seven|eight|nine|ten|twenty|thirty"
COUNT = rf"(?:[-+]?\d(?:[\d,]*\d)?(?:\.\d+)?(?:e[-+]?\d+)?|\b(?:{WORDS})\b)"
UNIT = r"\s?(?:%|×|per cent\b|m?s\b)|x\b(?!\d)|\s(?:times|(?:milli)?seconds?|minutes?|hours?)\b"
PART = r"\b(?:half|thirds?|quarters?|fifths?|tenths?) (?:of )?(?:the |its |an? )?(?:time|faster|slower|less|more|hour)"
FIGURE = re.compile(rf"{COUNT}(?:{UNIT})|{PART}\b|\btwice as\b")
CONSTANTS = (  # definitions, constants of the code, figures of the paper
    "sweeps every block 30 times", "stays above 4 times its smallest", "up to 4 times it", "is swept five times",
    "gains more than 3%", "more than twice its largest block", "adds 0 times a finite number",
    "at most 1% above Original", "that is within 1% of the best rate", "as the paper's 4.5x and 5.3x on a GPU",
)  # fmt: skip

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


@pytest.mark.parametrize("path", render.pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_show_the_result_files(path):
    page = path.read_text()
    assert render.render(page) == page


def test_every_result_file_is_on_a_page():
    regions = [match["source"] for path in render.pages() for match in render.REGION.finditer(path.read_text())]
    names = set(re.findall(r"[\w-]+", " ".join(regions)))
    assert {path.stem for path in (ROOT / "docs" / "results").glob("*.json")} <= names


@pytest.mark.parametrize("path", render.pages()[:-4], ids=lambda path: str(path.relative_to(ROOT)))
def test_figures_in_prose_are_rendered(path):
    assert unrendered_figures(path.read_text()) == []


def unrendered_figures(page: str) -> list[str]:
    """Durations, ratios and shares in the prose of a page, outside regions, code and CONSTANTS."""
    prose = render.REGION.sub("", page)
    for pattern in (r"^```.*?^```", r"^    .*?$", r"`[^`\n]*`"):
        prose = re.sub(pattern, "", prose, flags=re.DOTALL | re.MULTILINE)
    prose = " ".join(prose.split())
    for constant in CONSTANTS:
        prose = prose.replace(constant, "")
    return [match[0] for match in FIGURE.finditer(prose)]


def test_figures_in_prose_are_found():
    page = "It is 3.7x, 1e-3 s\nor five minutes: 40\n%.\n\n    9x\n\n`8x`\n<!-- render a -->\n7x\n<!-- end -->"
    assert unrendered_figures(page) == ["3.7x", "1e-3 s", "five minutes", "40 %"]


@pytest.mark.parametrize("name", ["digits-maf", "digits-p1", "emoji-p2", "fashion-p2"])
def test_model_cards_are_complete_and_their_code_runs(name, capsys):
    folder = ROOT / "src" / "jacobiflow" / "models" / name
    text = (folder / "README.md").read_text()
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
