"""The application. Bad input ends in one line on stderr and exit code 2.

A command is a file: a config, whose fields are the options and whose docstring is their help; `run(config)`, whose
docstring is the help of the command and which returns the result; and `show(result)`, which prints it. They import
PyTorch inside functions only, so that `--help` and misspelled options are quick.
"""

from __future__ import annotations

import inspect
import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from typing import Any, TypeVar

from cyclopts import App, CycloptsError, Group, Parameter
from cyclopts.help import DefaultFormatter, HelpPanel
from rich.text import Text

from jacobiflow import __version__
from jacobiflow.cli import bench, calibrate, convert, evaluate, info, options, output, output_files, plan, sample, train
from jacobiflow.errors import InputError, InputValueError

_STDOUT_CLOSED, _BAD_INPUT, _INTERRUPTED = 1, 2, 130  # Exit codes.
_TRACEBACK = "--traceback"
_OUT_OF_MEMORY = ("out of memory", "allocate memory", "bad_alloc", "_ALLOC_FAILED")  # In messages of PyTorch and CUDA.

Config = TypeVar("Config", bound=options.Config)
Result = TypeVar("Result")


class _Formatter(DefaultFormatter):
    """Panels whose lines are as long as the terminal allows, and not as in the docstrings."""

    def __call__(self, console: Any, options: Any, panel: HelpPanel) -> None:
        for entry in panel.entries:
            text: Any = entry.description
            text.primary_renderable = Text(_join_lines(str(text.primary_renderable)))
        super().__call__(console, options, panel)


def _join_lines(docstring: str) -> str:
    """Returns a docstring whose paragraphs are one line each, without backticks."""
    return "\n\n".join(" ".join(part.replace("`", "").split()) for part in docstring.split("\n\n"))


app = App(
    name="jacobiflow",
    help="Fast, certified sampling from autoregressive normalizing flows.",
    help_epilogue=f"jacobiflow {_TRACEBACK} COMMAND also shows the traceback of bad input.\n"
    "Documentation: https://jacobiflow.github.io/jacobiflow",
    help_flags="--help",
    help_format="plaintext",
    help_formatter=_Formatter(),
    version=f"jacobiflow {__version__}",
    default_parameter=Parameter(negative_bool=(), negative_iterable=(), allow_repeating=True),
)
app["--help"].group = app["--version"].group = Group("Options")


@dataclass(frozen=True)
class _Command:
    run: Callable[[Any], Any]
    show: Callable[[Any], None]
    describe_kept: Callable[[Any], str] | None


_commands: dict[type, _Command] = {}


def register(
    name: str, config_type: type[Config], run: Callable[[Config], Result | None], show: Callable[[Result], None],
    describe_kept: Callable[[Config], str] | None = None,
) -> None:  # fmt: skip
    """Adds a command to the application.

    Args:
        name: Name of the command.
        config_type: Frozen dataclass. Its fields are the options; its docstring is their help.
        run: Does the work. It returns a dataclass, perhaps with a method `to_json`, or with `problems` that make the
            exit code 2. Its docstring is the help of the command.
        show: Prints the result.
        describe_kept: Describes what Ctrl-C leaves of a run, and how to go on; without it, nothing is left.
    """
    app.command(config_type, name=name, help=_join_lines(inspect.getdoc(run) or ""), sort_key=len(_commands))
    _commands[config_type] = _Command(run, show, describe_kept)


def _in_processes(run: Callable[..., Any]) -> Callable[[Any], Any]:
    """Returns a command's `run` with the processes that share it; the result is that of the first one."""

    def run_shared(config: Any) -> Any:
        from jacobiflow.distributed import ProcessFailed, processes

        try:
            with processes() as group:
                result = run(config, group)
                return result if group.rank == 0 else None
        except ProcessFailed as error:
            if error.is_reported:
                raise SystemExit(_BAD_INPUT) from None
            raise

    run_shared.__doc__ = run.__doc__
    return run_shared


register("sample", sample.SampleConfig, sample.run, sample.show, sample.describe_kept)
register("calibrate", calibrate.CalibrateConfig, calibrate.run, calibrate.show, calibrate.describe_kept)
register("plan", plan.PlanConfig, plan.run, plan.show)
register("bench", bench.BenchConfig, bench.run, bench.show)
register("evaluate", evaluate.EvaluateConfig, _in_processes(evaluate.run), evaluate.show, evaluate.describe_kept)
register("train", train.TrainOptions, _in_processes(train.run), train.show, train.describe_kept)
register("convert", convert.ConvertConfig, convert.run, convert.show)
register("info", info.InfoConfig, info.run, info.show)


def run(arguments: Sequence[str]) -> int:
    """Runs a command line as `jacobiflow.cli.main` does."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # A terminal may not know every character.
    words = [word for word in arguments if word != _TRACEBACK]
    try:
        with _warnings_in_one_line():
            make_config, values, _ = app.parse_args(words, print_error=False, exit_on_error=False)
            config = make_config(*values.args, **values.kwargs)  # None after --help and --version.
            code = 0 if config is None else _run_command(config)
            print(end="", flush=True)
            return code
    except CycloptsError as error:
        message = f"{error} See {' '.join(('jacobiflow', *(error.command_chain or ())))} --help."
        if _is_first_process():  # All processes have the same command line.
            _print_line("error", message)
    except (InputError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout at exit.
            return _STDOUT_CLOSED
        if len(words) < len(arguments):
            traceback.print_exc()
        _print_line("error", _describe(error, words) if isinstance(error, InputError) else str(error))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in _OUT_OF_MEMORY):
            raise
        _print_line("error", "out of memory; give a smaller --batch-size, or smaller numbers")
    return _BAD_INPUT


def _run_command(config: options.Config) -> int:
    from jacobiflow.models.memory import keep_freed_memory
    from jacobiflow.utils.files import write_json

    command = _commands[type(config)]
    try:
        keep_freed_memory()
        _load_extensions()
        output_files.check_json(config)
        result = command.run(config)
    except KeyboardInterrupt:
        if _is_first_process():
            kept = "" if command.describe_kept is None else f": {command.describe_kept(config)}"
            print(f"interrupted{kept}", file=sys.stderr)
        return _INTERRUPTED
    if result is None:  # Another process has the result.
        return 0
    command.show(result)
    if config.json is not None:
        config.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(config.json, result.to_json() if hasattr(result, "to_json") else asdict(result))
    return _BAD_INPUT if getattr(result, "problems", ()) else 0


def _load_extensions() -> None:
    """Imports the modules of installed packages that register classes of their own."""
    for extension in entry_points(group=options.EXTENSIONS):
        try:
            extension.load()
        except Exception as error:  # Importing a module can raise anything.
            raise InputValueError(
                f"extension {extension.name}: cannot import {extension.value} ({type(error).__name__}: {error}); "
                "correct or uninstall the package that it is in"
            ) from error


def _is_first_process() -> bool:
    """Tells whether this is the first of the processes that torchrun or srun started, or the only one."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _describe(error: InputError, words: Sequence[str]) -> str:
    """Returns the message of an error, which names an option where the library names its argument."""
    command = app.parse_commands(words)[1][-1]
    names = {option.field_info.name: option.name for option in command.assemble_argument_collection()}
    option = names.get(error.argument or "")
    return str(error) if option is None else f"{option} {error.value}: {error.message}"


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _print_line("warning", str(message))
        yield


def _print_line(kind: str, message: str) -> None:
    print(f"{kind}: {output.one_line(message)}", file=sys.stderr)
