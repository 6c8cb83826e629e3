"""All commands: help, errors of one line with exit 2, streams, extensions."""

from __future__ import annotations

import inspect
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
from jacobiflow.cli import options
from jacobiflow.cli.app import app
from jacobiflow.cli.options import near_miss
from jacobiflow.native.library import Library

COMMANDS = ("sample", "calibrate", "plan", "bench", "evaluate", "train", "convert", "info")
PANELS = ("Model and samples", "Images", "Training", "Measurements", "Speed and exactness", "Guidance and denoising",
          "Output")  # fmt: skip
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(jf.__file__).parent.parent)}
SAMPLE = "sample --model model --strategy jacobi-1 --num 2 --out out-x"
MEASURE = "calibrate --model model --images pets --segments 2 --convergence-samples 1 --out out-x"
PLAN = "plan --model model --out out-x/p.json"


def python(program: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", program]
    return subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_panels_and_an_example_whose_options_exist(command: str, run: Any) -> None:
    result = run(f"{command} --help")
    assert (result.code, result.err) == (0, "")
    before, *panels = re.split(r"^╭─ ([A-Z][\w ]+) ─", result.out, flags=re.MULTILINE)
    assert panels[::2] == [name for name in PANELS if name in panels]
    example = " ".join(before.split()).partition("Example: ")[2]
    assert example.startswith(f"jacobiflow {command} ")
    options = ["--json", *re.findall(r"--[\w-]+", example)]
    assert all(f" {option} " in "".join(panels[1::2]) for option in options)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help(command: str) -> None:
    options = app[command].assemble_argument_collection(parse_docstring=True)
    assert [option.name for option in options if option.show and not option.parameter.help] == []


def test_help_lists_the_commands_in_order(run: Any) -> None:
    asked = run("--help")
    assert asked == run("-h") == run("")
    assert (asked.code, asked.err) == (0, "")
    assert tuple(re.findall(r"^│ (\w+) +\w", asked.out, re.MULTILINE)) == COMMANDS
    assert run("--version").out == f"jacobiflow {metadata.version('jacobiflow')}\n"


def test_at_most_twelve_functions_lead_from_a_command_line_to_the_native_code(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks, solve = [], Library.solve_transformer

    def record(*arguments: Any) -> Any:
        files = (Path(frame.filename) for frame in inspect.stack())
        stacks.append([file for file in files if file.is_relative_to(Path(jf.__file__).parent)])
        return solve(*arguments)

    monkeypatch.setattr(Library, "solve_transformer", record)
    line = "sample --model digits-p1 --num 2 --strategy sequential --plain"
    assert run(f"{line} --out {tmp_path}/out").code == 0
    assert 1 <= max(map(len, stacks)) <= 11  # And `solve_transformer` itself, which `record` stands for.


def test_without_its_packages_it_says_what_to_install() -> None:
    done = python("import sys; sys.modules['cyclopts'] = None; from jacobiflow.cli import main; sys.exit(main())")
    message = "error: the command line needs more packages: pip install 'jacobiflow[cli] @ git+https://"
    assert (done.returncode, done.stdout, done.stderr.startswith(message)) == (2, "", True)


MISSPELLED = {
    "": None,
    "sample --help": None,
    "sampel": 'Did you mean "sample"?',
    "plan": "plan needs --model and --out. Example: jacobiflow plan --model fashion-p2 --batch-size 4 --out ",
    "convert": "convert needs FILE and --out. Example: jacobiflow convert afhq_model_",
    "train --data d": "train needs --images and --steps and --out. Unknown option: --data. Example: ",
    "bench --num 4": "Unknown option: --num. See jacobiflow bench --help.",
    "train --imgs d": "train needs --images and --steps and --out. Did you mean --images instead of --imgs? Example: ",
    "sample --guidance": "--guidance needs a value: Weight of classifier-free guidance, such as 3; 0 is none. See ",
    "bench --batch-size 3.5": "Invalid value for --batch-size: 3.5 is not a whole number. See jacobiflow bench --help.",
    "evaluate --model fashion-p2": "nothing to evaluate: give --images or --samples",
    "info --model tests": "No model folder: it has no config.json. Give a bundled model (",
    "sample --out tests": "tests: holds files that this command did not write; give a new or empty folder",
    "sample --nun 3": 'Unknown option: --nun. Did you mean "--num"? See jacobiflow sample --help.',
    "sample --strategy jacobbi": 'Invalid value "jacobbi" for --strategy. Did you mean "jacobi"?',
    "bench --strategy auto --strategy gs-jacobbi:4-2": 'Did you mean "gs-jacobi"?',
    "sample --strategy wrong": 'Invalid value "wrong" for --strategy. Give one of auto, sequential, jacobi, ',
    "sample --tolerance -1": 'Invalid value "-1.0" for --tolerance. Must be >= 0.',
    "sample --report no.json": '"no.json" does not exist.',
    "info digits-p1": "digits-p1: there is no option before it. Did you mean --model digits-p1? See ",
    "evaluate docs --model fashion-p2": "docs: there is no option before it. See ",
    "sample cat": "cat: there is no option before it. Did you mean --labels cat or --prompts cat? See ",
    "sample --out cat.png": "--out cat.png: looks like a file; give a folder, such as cat",
    "convert no.pth --out m": '"no.pth" does not exist. See jacobiflow convert --help.',
    "evaluate --model fashion-p2 --images fashion-mnits": 'No such images. Did you mean "fashion-mnist"? Give ',
    "sample --model fashion-p3": 'No such model. Did you mean "fashion-p2"? Give a bundled model (digits-maf, ',
    "sample --dtype floot32": 'Did you mean "float32"?',
    "sample --files pgn": 'Choose from: "npz", "png".',
    "calibrate --model digits-p1 --images digits --out y --norm fr": 'Did you mean "fro"?',
    "train --images digits --out y --steps 1 --flow tarflwo": 'Did you mean "tarflow"?',
}


def test_help_and_misspelled_values_import_no_pytorch() -> None:
    program = "import shlex, sys; from jacobiflow.cli import main\nfor line in {}:\n print(main(shlex.split(line)))\n"
    done = python(program.format([*MISSPELLED]) + "sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr
    messages = [message for message in MISSPELLED.values() if message is not None]
    errors = done.stderr.splitlines()
    assert len(errors) == len(messages)
    for message, error in zip(messages, errors, strict=True):
        assert error.startswith("error: ") and message in error


def test_names_that_an_extension_may_register_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    check = near_miss("window").validator[0]
    for value in ("window:3+chord", "[1-2-3-4]", "front", "windows.json", None):
        check(str, value)
    with pytest.raises(ValueError, match="window"):
        check(str, "windows:3")
    monkeypatch.setattr(options, "find_extensions", lambda: ["an extension"])
    check(str, "windows:3")


REFUSED = {
    f"{SAMPLE} --labels {'1,' * 5000}": "no such class",
    f"{SAMPLE} --labels 0,1,2,10": "label 10: this flow has classes 0 to 2",
    f"{SAMPLE} --labels cat": "--labels cat: no such class; this model has no names of classes, give numbers",
    f"{SAMPLE} --dtype tf32": "--dtype tf32: only a GPU has it, and --device is cpu; give float32",
    f"{SAMPLE} --batch-size 2 --shard-size 3": "--shard-size 3: give a multiple of the batch size, 2",
    f"{SAMPLE} --strategy frontt": "give auto, sequential, jacobi, ",
    f"{SAMPLE} --report other.json": "the report is of another flow (fingerprint 000000000000, not ",
    f"{SAMPLE} --strategy s.json --report report.json": "--report report.json: s.json has its own guesses",
    f"{SAMPLE} --certify-always --no-certify": "--certify-always: excludes --no-certify; leave one of them out",
    f"{SAMPLE} --out file/out": "file/out",
    f"{SAMPLE} --json file/f.json": "--json file/f.json: cannot be written",
    f"{SAMPLE} --json pets": "--json pets: cannot be written; give a file in a folder that can be",
    f"{SAMPLE} --json out-x/f.json": "--json out-x/f.json: is in out-x, which this command uses; give another file",
    f"{SAMPLE} --strategy window.json --json pets/../window.json": "is in window.json, which this command uses",
    f"{PLAN} --batch-size 1000000000": 'Invalid value "1000000000" for --batch-size. Must be <= 65536.',
    f"{PLAN} --out model/new/../tuning.json": "--out model/new/../tuning.json: is in model, which this command uses",
    f"{PLAN} --tolerance -1": "--tolerance -1.0: give a positive number; at 0 use",
    f"{MEASURE} --seed 18446744073709551616": 'Invalid value "18446744073709551616" for --seed. Must be <= ',
    f"{MEASURE} --segments 0": 'Invalid value "0" for --segments. Must be >= 1. See jacobiflow calibrate --help.',
    f"{MEASURE} --per-class --unconditional": "--per-class True: needs the labels of the images, and a flow with ",
    f"{MEASURE} --images herd": "label 4: this flow has classes 0 to 2",
    "train --images digits --out out-x --steps 0": "--steps 0: give a positive whole number",
    "train --images digits --out out-x --steps 1 --blocks 0": "--blocks 0: give a positive whole number",
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
    result = run("--traceback info --model file")
    assert (result.code, "Traceback" in result.err) == (2, True)
    assert result.err.splitlines()[-1].startswith("error: 'file': no such model")


def test_a_closed_stdout_is_not_an_error(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as broken, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", broken)
        code = run("info --check model").code
    assert code == 1


def test_ctrl_c_once_more_does_not_interrupt_the_exit() -> None:
    done = python(
        "import atexit, os, signal, sys; from unittest.mock import Mock; from jacobiflow.cli import app, main\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
        "sys.argv, app._prepare = ['jacobiflow', 'info'], Mock(side_effect=KeyboardInterrupt)\n"
        "sys.exit(main())"
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize("name", ["cyclopts", "jacobiflow.cli.info", "numpy"])
def test_ctrl_c_during_an_import_is_one_line(name: str) -> None:
    done = python(
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(name, *_):\n"
        f"        if name == {name!r}:\n"
        "            try:\n"
        "                os.kill(os.getpid(), signal.SIGINT)\n"
        "            except KeyboardInterrupt:  # as NumPy does\n"
        "                raise ImportError('cannot load')\n"
        "sys.meta_path.insert(0, Finder)\n"
        "from jacobiflow.__main__ import main\n"
        "sys.argv = ['jacobiflow', 'info', '--model', 'digits-p1']\n"
        "sys.exit(main())"
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "ValueError('broken folder')"])
def test_ctrl_c_is_one_line_if_what_is_kept_cannot_be_told(error: str) -> None:
    done = python(
        "import sys; from unittest.mock import Mock; from jacobiflow.cli import app, main, sample\n"
        f"app._prepare, sample.describe_kept = Mock(side_effect=KeyboardInterrupt), Mock(side_effect={error})\n"
        "sys.argv = ['jacobiflow', 'sample']\n"
        "sys.exit(main())"
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_while_an_error_is_described_is_one_line(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jacobiflow.cli.app._describe", Mock(side_effect=KeyboardInterrupt))
    result = run("info --model file")
    assert (result.code, result.out, result.err) == (130, "", "interrupted\n")


def test_incomplete_variables_of_torchrun_are_one_line(refuse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuse(SAMPLE, "RANK, WORLD_SIZE, LOCAL_RANK: missing or not numbers ('RANK'); start the processes by torchrun")


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
    assert "wrote [bold]/[/red]/samples.png, manifest.json, " in result.out


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
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_LOCALID", "0")
    for rank, num_lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("SLURM_PROCID", rank)
        result = run("sample --num 0")
        assert (result.code, len(result.err.splitlines())) == (2, num_lines)
