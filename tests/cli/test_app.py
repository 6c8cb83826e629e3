"""All commands: help, errors of one line with exit 2, streams, extensions."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import jacobiflow as jf
from jacobiflow.cli.options import GROUPS

COMMANDS = ("sample", "calibrate", "plan", "bench", "evaluate", "train", "convert", "info")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(jf.__file__).parent.parent)}
SAMPLE = "sample --model model --strategy jacobi-1 --num 2 --out out-x"
MEASURE = "calibrate --model model --images pets --segments 2 --convergence-samples 1 --out out-x"
PLAN = "plan --model model --out out-x/p.json"


def python(program: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", program]
    return subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_whose_options_exist(command: str, run: Any) -> None:
    result = run(f"{command} --help")
    assert (result.code, result.err) == (0, "")
    before, *groups = re.split(r"^([A-Z][\w ]+):$", result.out, flags=re.MULTILINE)
    assert groups[::2] == [name for name in ("Arguments", *GROUPS) if name in groups]
    example = " ".join(before.split()).partition("Example: ")[2]
    assert example.startswith(f"jacobiflow {command} ")
    options = ["--json", *re.findall(r"--[\w-]+", example)]
    assert all(f" {option} " in "".join(groups[1::2]) for option in options)


def test_help_lists_the_commands(run: Any) -> None:
    asked, unasked = run("--help"), run("")
    assert asked == unasked
    assert (asked.code, asked.err) == (0, "")
    assert all(re.search(rf"^  {command} +\w", asked.out, re.MULTILINE) for command in COMMANDS)
    assert run("--version").out == f"jacobiflow {metadata.version('jacobiflow')}\n"


def test_help_imports_no_pytorch_and_shows_whole_summaries() -> None:
    done = python("import sys; from jacobiflow.cli import main; main(['--help']); sys.exit('torch' in sys.modules)")
    assert done.returncode == 0
    assert "..." not in done.stdout.partition("Commands:")[2]


def test_without_its_packages_it_says_what_to_install() -> None:
    done = python("import sys; sys.modules['typer'] = None; from jacobiflow.cli import main; sys.exit(main())")
    message = "error: the command line needs more packages: pip install 'jacobiflow[cli]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


REFUSED = {
    "sing": "No such command 'sing'",
    f"{SAMPLE} --quickly": "No such option: --quickly; see ",
    f"{SAMPLE} --labels {'1,' * 5000}": "or a .txt or .npy file",
    f"{SAMPLE} --labels 0,1,2,10": "label 10: this flow has classes 0 to 2",
    f"{SAMPLE} --dtype tf32": "--dtype tf32: only a GPU has it, and --device is cpu; give float32",
    f"{SAMPLE} --report other.json": "the report is of another flow (weights 000000000000, this ",
    f"{SAMPLE} --strategy s.json --report r.json": "--report r.json: s.json has its own guesses",
    f"{SAMPLE} --certify-always --no-certify": "--certify-always: excludes --no-certify; leave one of them out",
    f"{SAMPLE} --out file/out": "file/out",
    f"{SAMPLE} --part 9/8": "--part 9/8: give I/N with I from 1 to N, such as 1/8 for the first of eight",
    f"{SAMPLE} --part 1/2 --compare": "--compare: excludes --part; compare in a run of its own",
    f"{SAMPLE} --json file/f.json": "--json file/f.json: cannot be written",
    f"{SAMPLE} --strategy window.json --json pets/../window.json": "is in window.json, which this command reads",
    f"{PLAN} --batch-size 1000000000": "--batch-size 1000000000: give a whole number from 1 to 65,536, or auto",
    f"{MEASURE} --seed 18446744073709551616": "Invalid value for '--seed'",
    f"{MEASURE} --segments 0": "Invalid value for '--segments'",
    f"{MEASURE} --per-class --unconditional": "--per-class: leave out --unconditional",
    f"{MEASURE} --model plain --per-class": "--per-class: this model has no classes; leave it out",
    f"{MEASURE} --images herd": "label 4: this flow has classes 0 to 2",
    f"{MEASURE} --out pets": "pets: holds files that this command did not write; give a new or empty folder",
}


@pytest.mark.parametrize("line", REFUSED, ids=range(len(REFUSED)))
def test_bad_input_is_one_line_and_leaves_nothing(line: str, refuse: Any) -> None:
    refuse(line, REFUSED[line])


def test_too_little_memory_is_one_line_and_a_fault_of_the_library_keeps_its_traceback(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = SAMPLE.replace("out-x", f"{tmp_path}/out")
    for error in (MemoryError(), RuntimeError("CUDA error: out of memory")):
        monkeypatch.setattr(jf.Latent, "__call__", Mock(side_effect=error))
        result = run(line)
        message = "error: out of memory; give a smaller --batch-size, or smaller numbers\n"
        assert (result.code, result.out, result.err) == (2, "", message)
    monkeypatch.setattr(jf.Latent, "__call__", Mock(side_effect=RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        run(line)


def test_bad_input_has_a_traceback_if_it_is_asked_for(run: Any) -> None:
    result = run("--traceback info --model nothing-here")
    assert (result.code, "Traceback" in result.err) == (2, True)
    assert result.err.splitlines()[-1].startswith("error: 'nothing-here': no such model")


def test_a_terminal_of_ascii_shows_all_that_it_can(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), "ascii", "strict")
    monkeypatch.setattr(sys, "stdout", screen)
    assert run(SAMPLE.replace("out-x", f"{tmp_path}/\u2713")).code == 0
    assert f"wrote {tmp_path}/?:" in screen.buffer.getvalue().decode()  # type: ignore[attr-defined]


def test_a_closed_stdout_is_not_an_error(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as broken, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", broken)
        code = run("--version").code
    assert code == 1


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_stream_that_the_caller_has_closed_is_left_alone(
    stream: str, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for line, code in (("info --model model", 0), ("info --model nothing-here", 2)):
        with monkeypatch.context() as patch:
            patch.setattr(sys, stream, None)
            result = run(line)
        assert (result.code, getattr(result, stream.removeprefix("std"))) == (code, "")


def test_ctrl_c_once_more_does_not_interrupt_the_exit() -> None:
    done = python(
        "import atexit, os, signal, sys; from jacobiflow.cli import app, main\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
        "sys.argv, app.get_command = ['jacobiflow', 'info'], lambda app: lambda **_: 130\n"  # as typer after Ctrl-C
        "sys.exit(main())"
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_incomplete_variables_of_torchrun_are_one_line(refuse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for variables, message in (
        ({"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2"}, "RANK is not set"),
        ({"LOCAL_RANK": "0"}, "RANK is not set; start the processes by torchrun or srun"),
        ({"RANK": "abc"}, "a variable of torchrun or srun is not a number ("),
    ):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        refuse(SAMPLE, message)


def test_names_in_square_brackets_are_no_markup_and_a_warning_is_one_line(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow, show = jf.load("./plain"), warnings.showwarning
    monkeypatch.chdir(tmp_path)
    flow.save_pretrained("[/red]")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = run("sample --model './[/red]' --num 1 --guidance 1 --strategy jacobi --out '[bold]/[/red]'")
    assert result.err == "warning: guidance without labels or texts at attn_temperature 1 changes nothing\n"
    assert warnings.showwarning is show
    assert "./[/red]: 1 sample by jacobi on cpu, batch size 1\nsettings: --guidance 1\n" in result.out
    assert "wrote [bold]/[/red]: 1 shard, " in result.out


def test_an_extension_that_cannot_be_imported_gives_one_line(
    refuse: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "broken-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (installed / "entry_points.txt").write_text("[jacobiflow]\nbroken = broken_extension\n")
    monkeypatch.syspath_prepend(tmp_path)
    refuse(
        "info --model model",
        "extension broken: cannot import broken_extension (ModuleNotFoundError: No module named 'broken_extension'); "
        "correct or uninstall the package",
    )


def test_of_several_processes_the_first_one_prints_a_wrong_option(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"STEP_NUM_TASKS": "2", "LOCALID": "0", "JOB_ID": "7", "STEP_ID": "0", "STEP_NODELIST": "localhost"}
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for rank, num_lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("SLURM_PROCID", rank)
        result = run("sample --num 0")
        assert (result.code, len(result.err.splitlines())) == (2, num_lines)
