"""The application. Bad input ends in one line on stderr and exit code 2.

A command imports PyTorch inside its function, so that `--help` is quick.
"""

from __future__ import annotations

import functools
import inspect
import io
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand
from typer.exceptions import TyperException
from typer.main import get_command, get_group

from jacobiflow import __version__
from jacobiflow.cli import options, output, output_files
from jacobiflow.cli.bench import bench
from jacobiflow.cli.calibrate import calibrate
from jacobiflow.cli.evaluate import evaluate
from jacobiflow.cli.job import Interrupted
from jacobiflow.cli.models import convert, info
from jacobiflow.cli.plan import plan
from jacobiflow.cli.sample import sample
from jacobiflow.cli.train import train
from jacobiflow.errors import InputError, InputValueError

_STDOUT_CLOSED, _BAD_INPUT, _INTERRUPTED = 1, 2, 130  # Exit codes; typer returns 130 for a KeyboardInterrupt.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|allocate memory|DefaultCPUAllocator|bad_alloc|_ALLOC_FAILED|not enough memory", re.IGNORECASE
)

app = typer.Typer(
    name="jacobiflow",
    help="Fast, certified sampling from autoregressive normalizing flows.",
    epilog="Documentation: https://jacobiflow.github.io/jacobiflow",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class _Command(TyperCommand):
    """A command whose `--help` shows its options in groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {group: [] for group in ("Arguments", *options.GROUPS)}
        for parameter in self.get_params(ctx):
            is_argument = parameter.param_type_name == "argument"
            group = "Arguments" if is_argument else getattr(parameter, "rich_help_panel", None) or options.GROUPS[-1]
            if (record := parameter.get_help_record(ctx)) is not None:
                groups[group].append(record)
        for group, records in groups.items():
            if records:
                with formatter.section(group):
                    formatter.write_dl(records)


def _with_json(command: Callable[..., dict[str, Any] | None]) -> Callable[..., int]:
    """Returns the command with an option `--json`. The exit code is 2 if its results list problems."""

    @functools.wraps(command)
    def run(*, json: options.Json = None, **arguments: Any) -> int:
        from jacobiflow.models.memory import keep_freed_memory
        from jacobiflow.utils.files import write_json

        keep_freed_memory()
        _load_extensions()
        output_paths = [value for name, value in arguments.items() if name in ("out", "save_stats")]
        inputs = [value for value in arguments.values() if isinstance(value, str | Path) and value not in output_paths]
        if arguments.get("tune"):
            output_paths += output_files.tuning_files_beside(arguments["out"])
        output_files.check_output("--json", json, None, *inputs, outputs=output_paths)
        results = command(**arguments) or {}
        if json is not None and results:
            json.parent.mkdir(parents=True, exist_ok=True)
            write_json(json, results)
        return _BAD_INPUT if results.get("problems") else 0

    signature = inspect.signature(command, eval_str=True)
    option = inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=options.Json)
    parameters = [*signature.parameters.values(), option]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


_commands: dict[str, Callable[..., dict[str, Any] | None]] = {
    "sample": sample,
    "calibrate": calibrate,
    "plan": plan,
    "bench": bench,
    "evaluate": evaluate,
    "train": train,
    "convert": convert,
    "info": info,
}
for _name, _command in _commands.items():
    app.command(_name, cls=_Command)(_with_json(_command))


def _print_version(is_given: bool) -> None:
    if is_given:
        print(f"jacobiflow {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show the traceback of bad input too. Give it before the command.")
    ] = False,
) -> None:
    pass


def run(arguments: list[str]) -> int:
    """Runs a command line as `jacobiflow.cli.main` does."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # The caller has closed it.
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # A terminal may not know every character.
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: _print_line("warning", str(message))
            code = get_command(app)(args=arguments or ["--help"], prog_name="jacobiflow", standalone_mode=False)
            sys.stdout.flush()
        if code == _INTERRUPTED:
            raise Interrupted
        return code or 0
    except Interrupted as error:
        if _is_first_process():
            print(": ".join(filter(None, ("interrupted", str(error)))), file=sys.stderr)
        return _INTERRUPTED
    except TyperException as error:
        if not _is_first_process():  # All processes have the same command line.
            return _BAD_INPUT
        context = getattr(error, "ctx", None)
        remedy = "" if context is None else f"; see {context.command_path} --help"
        message = error.format_message().rstrip(".") + remedy
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout at exit.
        return _STDOUT_CLOSED
    except (InputError, OSError) as error:
        if "--traceback" in arguments:
            traceback.print_exc()
        message = str(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        message = "out of memory; give a smaller --batch-size, or smaller numbers"
    _print_line("error", message)
    return _BAD_INPUT


def _is_first_process() -> bool:
    if not {"TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS"} & os.environ.keys():
        return True
    from jacobiflow.distributed.launch import find_launch

    launch = find_launch(os.environ)
    return launch is None or launch.rank == 0


def _load_extensions() -> None:
    from importlib.metadata import entry_points

    for extension in entry_points(group="jacobiflow"):
        try:
            extension.load()
        except Exception as error:  # Importing a module can raise anything.
            raise InputValueError(
                f"extension {extension.name}: cannot import {extension.value} ({type(error).__name__}: {error}); "
                "correct or uninstall the package that it is in"
            ) from error


def _print_line(kind: str, message: str) -> None:
    names = {option.name: option.opts[0] for command in get_group(app).commands.values() for option in command.params}
    print(f"{kind}: {output.one_line(output.replace_arguments(message, names))}", file=sys.stderr)
