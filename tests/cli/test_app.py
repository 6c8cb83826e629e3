"""What all commands have in common: help, errors of one line with exit 2, interruption, streams, extensions."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scoring import levels

import jacobiflow as jf

COMMANDS = (
    "sample",
    "evaluate",
    "compare",
    "calibrate",
    "plan",
    "trace",
    "bench",
    "train",
    "convert",
    "export",
    "info",
    "doctor",
)
SAMPLE = "sample --model model --strategy jacobi-1 --num 2 --out out-x"
MEASURE = "calibrate --model model --images pets --segments 2 --traced 1 --out out-x/r.json"
TRACE = "trace --model model --report report.json --num 1 --out out-x"
PLAN = "plan --model model --report report.json --out out-x/p.json"
TRAIN = "train --images pets --image-size 8 --steps 2 --batch-size 4 --out out-x"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_whose_options_exist(command: str, run: Any) -> None:
    result = run(f"{command} --help")
    assert (result.code, result.err) == (0, "")
    text = " ".join(result.out.split())
    example = re.search(rf"Example: (jacobiflow {command} .*?) (Arguments|Options):", text)
    assert example is not None
    options = text.split("Options:")[1]
    assert all(f"{option} " in options for option in [*re.findall(r"--[\w-]+", example[1]), "--json"])


def test_help_lists_the_commands_with_and_without_asking(run: Any) -> None:
    asked, unasked = run("--help"), run("")
    assert asked == unasked
    assert (asked.code, asked.err) == (0, "")
    assert all(re.search(rf"^  {command} +\w", asked.out, re.MULTILINE) for command in COMMANDS)


def test_the_version_is_the_installed_one(run: Any) -> None:
    assert run("--version").out == f"jacobiflow {metadata.version('jacobiflow')}\n"


def test_a_shell_completes_commands_and_options(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for words, completed in (("jacobiflow cali", "calibrate"), ("jacobiflow sample --tol", "--tolerance")):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        monkeypatch.setenv("_JACOBIFLOW_COMPLETE", "complete_bash")
        assert run("").out.split() == [completed]


REFUSED = {
    "sing": "No such command 'sing'",
    f"{SAMPLE} --quickly": "No such option: --quickly; see ",
    f"{SAMPLE} --seed -1": "'--seed'",
    f"{SAMPLE} --labels {'1,' * 5000}": "or a .txt or .npy file",
    f"{SAMPLE} --strategy quickest": "strategy 'quickest': unknown; give auto, sequential",
    f"{SAMPLE} --strategy missing.json": "strategy missing.json: cannot be read (No such file or directory)",
    f"{SAMPLE} --tolerance 1e-3": "tolerance 0.001: strategy 'jacobi-1' stops after",
    f"{SAMPLE} --denoise -1": "--denoise -1.0: give 0",
    f"{SAMPLE} --num 1000000000000": "--num 1000000000000: the limit is 100,000,000; give less",
    f"{SAMPLE} --num 1{'0' * 30}": ": the limit is 100,000,000; give less",
    f"{PLAN} --batch-size 1000000000": "--batch-size 1000000000: the limit is 65,536; give less",
    "bench --batch-size 1 --batch-size 1000000000": "--batch-size 1000000000: the limit is 65,536; give less",
    f"{TRAIN} --image-size 1000000": "--image-size 1000000: the limit is 65,536; give less",
    f"{SAMPLE} --labels 0,1,2,10": "label 10: this flow has classes 0 to 2",
    f"{TRACE} --labels 0,10": "label 10: this flow has classes 0 to 2",
    f"{MEASURE} --segments 0": "--segments 0: give a positive whole number",
    f"{MEASURE} --batch-size 0": "--batch-size 0: give a positive whole number",
    f"{SAMPLE} --device abacus": "--device abacus: no such device here; give 'cpu'",
    f"{SAMPLE} --dtype int8": "--dtype int8: give one of float16",
    f"{SAMPLE} --json missing/f.json": "--json missing/f.json: give a file in a folder that exists",
    f"{SAMPLE} --out file/out": "--out file/out: cannot write there (Not a directory)",
    f"{SAMPLE} --model nothing": "'nothing': no such model; give a bundled name",
    f"{SAMPLE} --report other.json": "the report is of another flow (weights 000000000000, this ",
    f"{SAMPLE} --report file": "make it anew with jacobiflow calibrate",
    f"{MEASURE} --images empty": "empty: no image in it (looked for .bmp",
    f"{MEASURE} --images herd": "--images herd: 5 classes, the model has 3",
    f"{MEASURE} --norm 3": "--norm 3: give 2, fro or 1",
    f"{MEASURE} --segments 17": "there are only 16 tokens; give at most 16 segments",
    f"{MEASURE} --per-class --unconditional": "--per-class: needs a model with classes and labelled images",
    f"{MEASURE} --json out-x/../out-x/r.json": "out-x/r.json: is --out too; give two files",
    f"{PLAN} --out p.txt": "--out p.txt: give a file that ends in .json",
    "plan --model plain --out out-x/p.json": "--model plain: has no report.json; give --report",
    PLAN: "this report has no tuning: calibrate with --chord",
    f"{TRACE} --num 21": "--num 21: give 1 to 20 images",
    f"{TRACE} --strategy [7-2-3-2]": "Stack names block 7, the flow has 0 to 2",
    f"{TRAIN} --patch-size 3": "--patch-size 3 does not divide --image-size 8",
    f"{TRAIN} --batch-size 10": "--batch-size 10: there are only 9 images",
}


@pytest.mark.parametrize("line", REFUSED, ids=range(len(REFUSED)))
def test_bad_input_is_one_line_and_leaves_nothing(line: str, refuse: Any) -> None:
    refuse(line, REFUSED[line])


@pytest.mark.parametrize("line", [SAMPLE, MEASURE, TRACE])
def test_a_full_disk_is_one_line_and_leaves_no_file_or_new_folder(
    line: str, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    result = run(line.replace("out-x", f"{tmp_path}/new/out"))
    assert (result.code, result.out, result.err) == (2, "", "error: [Errno 28] No space left on device\n")
    assert os.listdir(tmp_path) == []


TOO_MUCH: dict[str, Callable[[], object]] = {
    "out of memory; give a smaller --batch-size\n": lambda: torch.empty(1 << 55, dtype=torch.uint8),
    "out of memory; give a smaller": lambda: np.empty(1 << 55, np.uint8),
    "out of memory; give": lambda: exec("raise torch.OutOfMemoryError('CUDA out of memory')"),
    "out of memory": lambda: exec("raise RuntimeError('CUDA error: out of memory')"),
}


@pytest.mark.parametrize("message", TOO_MUCH)
def test_what_is_too_much_is_one_line(message: str, refuse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jf.Latent, "__call__", lambda *_: TOO_MUCH[message]())
    refuse(SAMPLE, f"error: {message}")


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, TypeError, OverflowError])
def test_a_fault_of_the_library_keeps_its_traceback(
    kind: type[Exception], run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise kind("shapes differ")

    monkeypatch.setattr(jf.Latent, "__call__", fail)
    with pytest.raises(kind, match="shapes differ"):
        run(f"{SAMPLE}-y")


def test_bad_input_has_a_traceback_if_it_is_asked_for(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = "info --model nothing-here"
    assert "Traceback" not in run(bad).err
    assert "Traceback" in run(f"--traceback {bad}").err
    monkeypatch.setenv("JACOBIFLOW_TRACEBACK", "1")
    result = run(bad)
    assert result.code == 2
    assert "Traceback" in result.err
    assert result.err.splitlines()[-1].startswith("error: 'nothing-here': no such model")


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT interrupts, also where the tests were started in the background, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# Run by Python before anything else: Ctrl-C where PyTorch is about to be imported.
SITE = """
import importlib.abc, os, signal, sys

class Interrupt(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupt())
"""


@pytest.mark.parametrize("program", [["-m", "jacobiflow"], ["jacobiflow"]])
def test_an_interruption_of_imports_is_one_line(program: list[str], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITE)
    (tmp_path / "jacobiflow").write_text("from jacobiflow.cli import main\nmain()\n")  # as pip writes it
    sources = str(Path(jf.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), sources))}
    line = [sys.executable, *program, "info"]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_a_second_interruption_does_not_wait(tmp_path: Path) -> None:
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.path.insert(0, {str(Path(jf.__file__).parent)!r}); import launch\n"
        "with launch.interruptible():\n"
        "    try: signal.raise_signal(signal.SIGINT)\n"
        "    finally: signal.raise_signal(signal.SIGINT); print('cleaned up')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("line", [f"{SAMPLE} --compare", f"{MEASURE} --html out-x.html", TRACE])
def test_an_interruption_is_exit_130_and_leaves_nothing(
    line: str, run: Any, files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jf.Latent, "__call__", lambda *_: signal.raise_signal(signal.SIGINT))
    before, result = files(), run(line)
    assert (result.code, result.out, result.err) == (130, "", "interrupted\n")
    assert files() == before


@pytest.mark.usefixtures("ctrl_c")
def test_the_same_command_goes_on_where_it_was_interrupted(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, guess = tmp_path / "shards", jf.Latent.__call__

    def interrupt(*arguments: Any) -> torch.Tensor:
        if (shards / "00000.json").exists():
            signal.raise_signal(signal.SIGINT)
        return guess(*arguments)

    line = f"sample --model model --strategy jacobi-1 --num 4 --batch-size 2 --shard-size 2 --out {tmp_path}"
    with monkeypatch.context() as patch:
        patch.setattr(jf.Latent, "__call__", interrupt)
        assert run(line).code == 130
    assert {path.name for path in shards.iterdir()} == {"00000.json", "00000.npz"}
    resumed = run(line)
    assert (resumed.code, "resumed, 1 of 2 shards to draw" in resumed.err) == (0, True)
    want = jf.sample(
        jf.load("./model"), 4, torch.tensor([0, 1, 2, 0]), strategy="jacobi-1", batch_size=2, progress=False
    )
    with np.load(shards / "00001.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], levels(want.images)[2:])


def test_the_module_is_the_same_program_and_closed_streams_change_nothing(work: Path, tmp_path: Path) -> None:
    """No message goes into a file that took the number of a closed stream."""
    line = "-m jacobiflow sample --model plain --num 1 --guidance 1 --strategy jacobi-1"
    line = f"{sys.executable} {line} --out {tmp_path} --json {tmp_path}/f.json >&- 2>&-"
    done = subprocess.run(["sh", "-c", line], cwd=work, timeout=300)
    assert done.returncode == 0
    assert json.loads((tmp_path / "f.json").read_text())["num"] == 1


def test_a_terminal_of_ascii_shows_all_that_it_can(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), "ascii", "strict")
    monkeypatch.setattr(sys, "stdout", screen)
    line = f"calibrate --model model --images pets --segments 2 --traced 1 --per-class --out {tmp_path}/\u2713.json"
    assert run(line).code == 0
    assert f"wrote {tmp_path}/?.json" in screen.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert screen.errors == "strict"


@pytest.mark.filterwarnings("always")
def test_messages_that_cannot_be_written_are_lost_and_nothing_else(run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    with open("/dev/full", "w", buffering=1) as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", full)
        assert run(f"sample --model plain --num 1 --guidance 1 --strategy jacobi-1 --out {tmp_path}").code == 0
        assert run("info --model nothing").code == 2


def test_a_reader_that_is_gone_is_no_error(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as broken, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", broken)
        code = run("info --model plain").code
    assert (code, run("info --model plain").err) == (1, "")


def test_names_in_square_brackets_are_no_markup_and_a_warning_is_one_line(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow, show = jf.load("./plain"), warnings.showwarning
    monkeypatch.chdir(tmp_path)
    flow.save_pretrained("[/red]")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = run("sample --model './[/red]' --num 1 --guidance 1 --strategy jacobi --out '[bold]/[/red]'")
    assert result.err == "warning: guidance without labels at attn_temperature 1 changes nothing\n"
    assert warnings.showwarning is show
    assert "./[/red]: 1 image, batch size 1\n" in result.out
    assert "wrote [bold]/[/red]: 1 shard, " in result.out
    assert "./[/red]" in run("info --model './[/red]'").out


def test_an_extension_that_cannot_be_imported_is_one_line(
    refuse: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "broken-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (installed / "entry_points.txt").write_text("[jacobiflow]\nbroken = broken_extension\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    refuse("info --model model", "extension broken: cannot import broken_extension (ModuleNotFoundError: No module")
    (tmp_path / "broken_extension.py").write_text("1 / 0")
    refuse("info --model model", "(ZeroDivisionError: division by zero); correct or uninstall the package")
