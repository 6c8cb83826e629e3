"""The examples in docs run and print their comments, and every number comes from a result file.

tests/test_wheel.py runs the examples of README, tests/test_commands.py the commands.
"""

from __future__ import annotations

import inspect
import json
import re
import shlex
from pathlib import Path

import pytest
from cyclopts import CycloptsError, MissingArgumentError, ValidationError

import jacobiflow as jf
from benchmarks import search_guidance
from jacobiflow.cli.app import app
from tools.docs import render

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = ("aspire", "causalflows", "ili", "nessai", "pocomc")  # packages of examples, and no tools of this project
EXAMPLES = [
    (path, match.group(1))
    for path in sorted((ROOT / "docs").glob("*.md"))
    for match in re.finditer(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
]

# Durations, ratios and shares.
WORDS = "two|three|four|five|six|seven|eight|nine|ten|twenty|thirty"
COUNT = rf"(?:[-+]?\d(?:[\d,]*\d)?(?:\.\d+)?(?:e[-+]?\d+)?|\b(?:{WORDS})\b)"
UNIT = r"\s?(?:%|×|per cent\b|m?s\b)|x\b(?!\d)|\s(?:times|(?:milli)?seconds?|minutes?|hours?)\b"
PART = r"\b(?:half|thirds?|quarters?|fifths?|tenths?) (?:of )?(?:the |its |an? )?(?:time|faster|slower|less|more|hour)"
NUMBER = re.compile(rf"{COUNT}(?:{UNIT})|{PART}\b|\btwice as\b")
CONSTANTS = (  # definitions, constants of the code, numbers of the paper
    "sweeps every block 30 times", "stays above 4 times its smallest", "within 4 times this rounding",
    "is swept five times", "gains more than 3%", "more than twice its largest block", "adds 0 times a finite number",
    "at most 1% above Original", "that is within 1% of the best rate", "as the paper's 4.5x and 5.3x on a GPU",
)  # fmt: skip

PAGES = [ROOT / "CONTRIBUTING.md", *render.pages()]
IN_SENTENCES = re.compile(r"`(jacobiflow \w[^`|\\]*)")
FILE = re.compile(r"`((?:src|tests|tools|benchmarks|examples|docs)/[^`\s]+)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_targets_of_make_that_a_page_names_exist(page):
    text, targets = page.read_text(), re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [name for name in FILE.findall(text) if not (ROOT / name.partition(":")[0]).exists()] == []
    assert {*re.findall(r"`make ([\w-]+)", text)} <= {*targets}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_command_line_takes_the_commands_of_sentences(page):
    for text in IN_SENTENCES.findall(page.read_text()):
        words = [word for word in shlex.split(text)[1:] if word != "--traceback"]
        try:
            app.parse_args(words, print_error=False, exit_on_error=False)
        except (MissingArgumentError, ValidationError):
            pass  # A sentence may leave it out, or name a model that is not here.
        except CycloptsError as error:
            pytest.fail(f"{text}: {error}")


@pytest.mark.slow
def test_the_default_estimator_of_sbi_is_as_the_page_says():
    inference = pytest.importorskip("sbi.inference")
    (default,) = re.findall(r'`"(\w+)"` \(the default of NPE and NLE\)', (ROOT / "docs/sbi.md").read_text())
    for trainer in (inference.NPE, inference.NLE):
        assert inspect.signature(trainer).parameters["density_estimator"].default == default


@pytest.mark.parametrize(("path", "code"), EXAMPLES, ids=[path.name for path, _ in EXAMPLES])
def test_an_example_prints_its_comments(path, code, capsys, tmp_path, monkeypatch):
    for name in re.findall(rf"^(?:import|from) ({'|'.join(CLIENTS)})\b", code, re.MULTILINE):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, path.name, "exec"), {"__name__": "example"})
    expected = re.findall(r"^# (.*)$", code.split("print(")[-1], re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == expected


@pytest.mark.parametrize("path", render.pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_numbers_of_a_page_are_those_of_result_files(path):
    page = path.read_text()
    assert render.render(page) == page
    assert not re.search("^ *<!-- render =", page, re.MULTILINE), "a comment at the start of a line ends a paragraph"
    if path.parent.parent.name != "bundled":  # whose cards have the numbers of the training too
        assert numbers_in_prose(page) == []
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page):
        assert "://" in target or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", render.pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_times_of_a_page_are_of_one_machine(path):
    if path.name != "paper.md":  # whose tables take days, and each names its machine
        sources = " ".join(match["source"] for match in render.REGION.finditer(path.read_text()))
        names = {path.stem for path in (ROOT / "docs" / "results").glob("*.json")} & {*re.findall(r"[\w-]+", sources)}
        results = [render.result(name) for name in names]
        timed = [
            result
            for result in results
            if "tools." not in result.get("command", "") and '"seconds"' in json.dumps(result)
        ]
        assert len({result["machine"]["processor"] for result in timed}) <= 1


def test_every_result_file_is_on_a_page():
    regions = [match["source"] for path in render.pages() for match in render.REGION.finditer(path.read_text())]
    names = set(re.findall(r"[\w-]+", " ".join(regions)))
    assert {path.stem for path in (ROOT / "docs" / "results").glob("*.json")} <= names


def numbers_in_prose(page: str) -> list[str]:
    """Numbers outside regions, code and CONSTANTS."""
    prose = render.REGION.sub("", page)
    for pattern in (r"^```.*?^```", r"^    .*?$", r"`[^`\n]*`"):
        prose = re.sub(pattern, "", prose, flags=re.DOTALL | re.MULTILINE)
    prose = " ".join(prose.split())
    for constant in CONSTANTS:
        prose = prose.replace(constant, "")
    return [match[0] for match in NUMBER.finditer(prose)]


def test_numbers_in_prose_are_found():
    page = "It is 3.7x, 1e-3 s\nor five minutes: 40\n%.\n\n    9x\n\n`8x`\n<!-- render a -->\n7x\n<!-- end -->"
    assert numbers_in_prose(page) == ["3.7x", "1e-3 s", "five minutes", "40 %"]


@pytest.mark.parametrize("name", ["digits-maf", "digits-p1", "emoji-p2", "fashion-p2"])
def test_model_cards_are_complete_and_their_code_runs(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = ROOT / "src" / "jacobiflow" / "bundled" / name
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    for line in ("license: apache-2.0", "library_name: jacobiflow", "pipeline_tag: unconditional-image-generation"):
        assert f"{line}\n" in front
    (code,) = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    exec(compile(code, name, "exec"), {})
    assert capsys.readouterr().out.strip() == re.findall(r"# (\(.*\)),", code)[0]
    assert jf.load(name).recommended == search_guidance.recommended(render.result(f"{name}-search")["runs"])
