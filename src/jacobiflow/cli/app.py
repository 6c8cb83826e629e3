"""The application, and how errors reach the user: one line, in the command line's words, and exit 2."""

from __future__ import annotations

import functools
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException
from typer.main import get_command

from jacobiflow import __version__
from jacobiflow.cli import (
    bench,
    calibrate,
    compare,
    convert,
    doctor,
    evaluate,
    export,
    info,
    plan,
    sample,
    trace,
    train,
)
from jacobiflow.cli.failures import message_of
from jacobiflow.cli.options import Limited
from jacobiflow.cli.streams import lenient_streams, silence
from jacobiflow.cli.words import in_options, one_line
from jacobiflow.errors import InputValueError
from jacobiflow.launch import INTERRUPTED, interruptible
from jacobiflow.memory import keep_freed_memory
from jacobiflow.storage import FirstProcessFailed

app = typer.Typer(
    name="jacobiflow",
    help="Fast, certified sampling from autoregressive normalizing flows.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
_COMMANDS: dict[str, Callable[..., None]] = {
    "sample": sample.sample, "evaluate": evaluate.evaluate, "compare": compare.compare,
    "calibrate": calibrate.calibrate, "plan": plan.plan, "trace": trace.trace, "bench": bench.bench,
    "train": train.train, "convert": convert.convert, "export": export.export,
    "info": info.info, "doctor": doctor.doctor,
}  # fmt: skip
for _name, _command in _COMMANDS.items():
    app.command(_name, cls=Limited)(_command)
_LOST_READER, _BAD_INPUT = 1, 2


def _version(asked: bool) -> None:
    if asked:
        print(f"jacobiflow {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show the traceback of bad input too. Give it before the command.")
    ] = False,
) -> None:
    keep_freed_memory()


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Exits 0 on success, 2 with one line on bad input, 130 with one when interrupted.

    A fault of the library keeps its traceback. `jacobiflow --traceback COMMAND`, or JACOBIFLOW_TRACEBACK=1 in the
    environment, shows that of bad input too.

    1 is for a reader of stdout that is gone, as in `jacobiflow info | true`.

    Modules that installed packages name as entry points of the group "jacobiflow" are imported first. All commands
    take what they register, see docs/extending.md.
    """
    with lenient_streams():
        code = _run(sys.argv[1:] if arguments is None else arguments)
    if code:
        sys.exit(code)


def _run(arguments: Sequence[str]) -> int:
    """The exit code of a command line."""
    try:
        with interruptible(), warnings.catch_warnings():
            _load_extensions()
            warnings.showwarning = functools.partial(_show_warning, arguments)
            code = _commands()(
                args=arguments or ["--help"], prog_name="jacobiflow", standalone_mode=False, obj=tuple(arguments)
            )
            sys.stdout.flush()
        if code == INTERRUPTED:  # which typer makes of a KeyboardInterrupt
            raise KeyboardInterrupt
        return code or 0
    except TyperException as error:
        context = getattr(error, "ctx", None)
        remedy = "" if context is None else f"; see {context.command_path} --help"
        return _failed(error.format_message().rstrip(".") + remedy)
    except FirstProcessFailed:
        return _BAD_INPUT  # the first process says why
    except BrokenPipeError:
        silence(sys.stdout)
        return _LOST_READER
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        message = message_of(error, _is_batched(arguments))
        if message is None:
            raise
        if "--traceback" in arguments or os.environ.get("JACOBIFLOW_TRACEBACK") == "1":
            traceback.print_exc()
        return _failed(in_options(message, _commands(), arguments))


def _load_extensions() -> None:
    for extension in entry_points(group="jacobiflow"):
        try:
            extension.load()
        except Exception as error:  # whatever a module does when it is imported
            raise InputValueError(
                f"extension {extension.name}: cannot import {extension.value} ({type(error).__name__}: {error}); "
                "correct or uninstall the package that it is in"
            ) from error


def _failed(message: str) -> int:
    try:
        sys.stdout.flush()
    except OSError:  # full, which may be what the message says
        silence(sys.stdout)
    print(f"error: {one_line(message)}", file=sys.stderr)
    return _BAD_INPUT


def _show_warning(arguments: Sequence[str], message: Warning | str, *_: Any) -> None:
    print(f"warning: {one_line(in_options(str(message), _commands(), arguments))}", file=sys.stderr)


def _is_batched(arguments: Sequence[str]) -> bool:
    """Whether the command that is asked for has `--batch-size`."""
    names = (text for text in arguments if not text.startswith("-"))
    command = _commands().commands.get(next(names, ""))
    return command is not None and any(parameter.name == "batch_size" for parameter in command.params)


@functools.cache  # they take half a second to build
def _commands() -> TyperGroup:
    commands = get_command(app)
    assert isinstance(commands, TyperGroup)  # which typer makes of several commands
    return commands
