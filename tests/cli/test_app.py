"""What all commands have in common: help, errors of one line with exit 2, interruption, extensions."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
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


def test_the_module_is_the_same_program(work: Path) -> None:
    line = [sys.executable, "-m", "jacobiflow", "sample", "--model", "model", "--labels", "99"]
    done = subprocess.run(line, cwd=work, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: label 99: this flow has classes 0 to 2 (below 0: no class)\n"


REFUSED = {
    "sing": "No such command 'sing'",
    f"{SAMPLE} --quickly": "No such option: --quickly; see ",
    f"{SAMPLE} --seed -1": "'--seed'",
    f"{SAMPLE} --labels {'1,' * 5000}": "or a .txt or .npy file",
    f"{SAMPLE} --strategy quickest": "strategy 'quickest': unknown; give auto, sequential",
    f"{SAMPLE} --strategy missing.json": "strategy missing.json: cannot be read (No such file or directory)",
    f"{SAMPLE} --tolerance 1e-3": "tolerance 0.001: strategy 'jacobi-1' stops after",
    f"{SAMPLE} --denoise -1": "--denoise -1.0: give 0",
    f"{SAMPLE} --device abacus": "--device abacus: not available here; give cpu",
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
def test_a_full_disk_is_one_line_and_leaves_no_half_file(
    line: str, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    result = run(line.replace("out-x", str(tmp_path)))
    assert (result.code, result.out, result.err) == (2, "", "error: [Errno 28] No space left on device\n")
    assert set(os.listdir(tmp_path)) <= {".lock"}


def test_an_exhausted_memory_is_one_line(refuse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(jf.Latent, "__call__", exhausted)
    refuse(SAMPLE, "error: out of memory; give a smaller --batch-size\n")


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT interrupts, also where the tests were started in the background, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("line", [f"{SAMPLE} --compare", MEASURE, TRACE])
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


def test_names_in_square_brackets_are_no_markup_and_a_warning_is_one_line(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow, show = jf.load("./plain"), warnings.showwarning
    monkeypatch.chdir(tmp_path)
    flow.save_pretrained("[/red]")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = run("sample --model './[/red]' --num 1 --guidance 1 --strategy jacobi-1 --out '[bold]/[/red]'")
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
