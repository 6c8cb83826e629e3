"""The application, and how errors reach the user: one line, in the command line's words, and exit 2."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import torch
import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException
from typer.main import get_command

from jacobiflow.cli import bench, calibrate, compare, convert, evaluate, info, plan, sample, trace, train
from jacobiflow.cli.words import in_options, one_line
from jacobiflow.storage import FirstProcessFailed

app = typer.Typer(
    name="jacobiflow",
    help="Fast, certified sampling from autoregressive normalizing flows.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
_COMMANDS: dict[str, Callable[..., None]] = {
    "sample": sample.sample, "evaluate": evaluate.evaluate, "compare": compare.compare,
    "calibrate": calibrate.calibrate, "plan": plan.plan, "trace": trace.trace, "bench": bench.bench,
    "train": train.train, "convert": convert.convert, "info": info.info,
}  # fmt: skip
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)
_BAD_INPUT, _INTERRUPTED = 2, 130


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Exits 0 on success, 2 with one line on bad input, 130 when interrupted.

    Modules that installed packages name as entry points of the group "jacobiflow" are imported first. All commands
    take what they register, see docs/extending.md.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        _load_extensions()
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            code = app(args=arguments or ["--help"], standalone_mode=False)
        if code == _INTERRUPTED:  # which typer makes of a KeyboardInterrupt
            raise KeyboardInterrupt
    except TyperException as error:
        context = getattr(error, "ctx", None)
        remedy = "" if context is None else f"; see {context.command_path} --help"
        _fail(error.format_message().rstrip(".") + remedy)
    except FirstProcessFailed:
        sys.exit(_BAD_INPUT)  # the first process says why
    except (ValueError, OSError) as error:
        _fail(_in_options(str(error)))
    except (MemoryError, torch.OutOfMemoryError):
        _fail("out of memory; give a smaller --batch-size")
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        sys.exit(_INTERRUPTED)


def _load_extensions() -> None:
    for extension in entry_points(group="jacobiflow"):
        try:
            extension.load()
        except Exception as error:  # whatever a module does when it is imported
            raise ValueError(
                f"extension {extension.name}: cannot import {extension.value} ({type(error).__name__}: {error}); "
                "correct or uninstall the package that it is in"
            ) from error


def _fail(message: str) -> None:
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(_BAD_INPUT)


def _show_warning(message: Warning | str, *_: Any) -> None:
    print(f"warning: {one_line(_in_options(str(message)))}", file=sys.stderr)


def _in_options(message: str) -> str:
    commands = get_command(app)
    assert isinstance(commands, TyperGroup)  # which typer makes of several commands
    return in_options(message, commands)
