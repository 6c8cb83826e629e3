"""The application, and its errors: one line and exit code 2.

Nothing here imports PyTorch before a command runs, so that help is quick: a command module holds its options, and
imports what it runs inside its function.
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
from typer.main import get_command

from jacobiflow import __version__
from jacobiflow.cli import bench, calibrate, convert, evaluate, info, options, plan, sample, train
from jacobiflow.cli.screen import one_line
from jacobiflow.errors import InputError, InputValueError

_LOST_READER, _BAD_INPUT, _INTERRUPTED = 1, 2, 130
_OUT_OF_MEMORY = re.compile(
    r"out of memory|allocate memory|DefaultCPUAllocator|bad_alloc|_ALLOC_FAILED|not enough memory", re.IGNORECASE
)


class _Command(TyperCommand):
    """A command that loads extensions before it runs."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        from jacobiflow.memory import keep_freed_memory

        keep_freed_memory()
        _load_extensions()
        return super().invoke(ctx)


app = typer.Typer(
    name="jacobiflow",
    help="Fast, certified sampling from autoregressive normalizing flows.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _with_json(command: Callable[..., dict[str, Any] | None]) -> Callable[..., int]:
    """The command with an option `--json`; its exit code is 2 if its results have problems."""

    @functools.wraps(command)
    def run(*, json: options.Json = None, **arguments: Any) -> int:
        inputs = [value for name, value in arguments.items() if isinstance(value, str | Path) and name != "out"]
        options.check_output("--json", json, arguments.get("model", ""), *inputs)
        results = command(**arguments) or {}
        if json is not None and results:
            from jacobiflow.files import write_json

            json.parent.mkdir(parents=True, exist_ok=True)
            write_json(json, results)
        return _BAD_INPUT if results.get("problems") else 0

    signature = inspect.signature(command, eval_str=True)
    option = inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=options.Json)
    parameters = [*signature.parameters.values(), option]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


for _function in (
    sample.sample, calibrate.calibrate, plan.plan, bench.bench, evaluate.evaluate, train.train, convert.convert,
    info.info,
):  # fmt: skip
    app.command(_function.__name__, cls=_Command)(_with_json(_function))


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


def main(arguments: list[str] | None = None) -> None:
    """Runs a command line, by default that of the process, and exits unless it succeeds.

    The exit code is 2 with one line on bad input, 130 when interrupted, and 1 if the reader of stdout is gone. A fault
    of the library keeps its traceback; `jacobiflow --traceback COMMAND` shows that of bad input too.

    Modules that installed packages name as entry points of the group "jacobiflow" are imported before a command runs;
    all commands take what they register.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may lack a character
    code = _run(sys.argv[1:] if arguments is None else arguments)
    if code:
        sys.exit(code)


def _run(arguments: list[str]) -> int:
    """The exit code of a command line."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            code = get_command(app)(args=arguments or ["--help"], prog_name="jacobiflow", standalone_mode=False)
            sys.stdout.flush()
    except TyperException as error:
        context = getattr(error, "ctx", None)
        remedy = "" if context is None else f"; see {context.command_path} --help"
        return _refused(error.format_message().rstrip(".") + remedy)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it at the end
        return _LOST_READER
    except (typer.Abort, KeyboardInterrupt):
        code = _INTERRUPTED
    except (InputError, OSError) as error:
        if "--traceback" in arguments:
            traceback.print_exc()
        return _refused(str(error))
    except (MemoryError, RuntimeError) as error:  # PyTorch's
        if isinstance(error, RuntimeError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        return _refused("out of memory; give a smaller --batch-size, or smaller numbers")
    if code == _INTERRUPTED:  # typer's code for a KeyboardInterrupt
        print("interrupted", file=sys.stderr)
    return code or 0


def _load_extensions() -> None:
    from importlib.metadata import entry_points

    for extension in entry_points(group="jacobiflow"):
        try:
            extension.load()
        except Exception as error:  # anything that importing a module can raise
            raise InputValueError(
                f"extension {extension.name}: cannot import {extension.value} ({type(error).__name__}: {error}); "
                "correct or uninstall the package that it is in"
            ) from error


def _refused(message: str) -> int:
    print(f"error: {one_line(message)}", file=sys.stderr)
    return _BAD_INPUT


def _show_warning(message: Warning | str, *_: Any) -> None:
    print(f"warning: {one_line(str(message))}", file=sys.stderr)
