"""The application, which runs commands. Bad input ends in one line on stderr and exit code 2.

A command is a file with a line in `app`:

- a config, a frozen dataclass whose fields are the options and whose docstring is their help;
- `run(config)`, which does the work and returns a dataclass, perhaps with a method `to_json`, or with `problems` that
  make the exit code 2; it returns `None` if another process has the result;
- `show(config, result)`, which prints the result;
- perhaps `describe_kept(config)`, which tells what Ctrl-C leaves of a run, and how to go on.

Commands are imported if they run, and import PyTorch inside functions only, so that `--help` and misspelled options are
quick.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote
from typing import Any

from cyclopts import App, CycloptsError, Group, Parameter
from cyclopts.exceptions import MissingArgumentError, UnknownOptionError, UnusedCliTokensError

from jacobiflow import __version__
from jacobiflow.cli import options, output
from jacobiflow.errors import InputError, InputValueError
from jacobiflow.utils.launch import find_launch

_STDOUT_CLOSED, _BAD_INPUT, _INTERRUPTED = 1, 2, 130  # Exit codes.
_TRACEBACK = "--traceback"
_OUT_OF_MEMORY = ("out of memory", "allocate memory", "bad_alloc", "_ALLOC_FAILED")  # In messages of PyTorch and CUDA.

app = App(
    name="jacobiflow",
    help="Fast, certified sampling from autoregressive normalizing flows. For a flow of zuko, sbi or another library, "
    "call jacobiflow.accelerate(flow) in Python.",
    help_epilogue="Try: jacobiflow sample --model emoji-star --prompts sunglasses sob\n"
    f"jacobiflow {_TRACEBACK} COMMAND also shows the traceback of bad input.\n"
    "Documentation: https://jacobiflow.github.io/jacobiflow",
    help_flags=("--help", "-h"),
    help_format="plaintext",
    version=f"jacobiflow {__version__}",
    default_parameter=Parameter(
        negative_bool=(), negative_iterable=(), allow_repeating=True, converter=options.convert
    ),
)
app["--help"].group = app["--version"].group = Group("Options")
app.command("jacobiflow.cli.sample:SampleConfig", name="sample", sort_key=1)
app.command("jacobiflow.cli.calibrate:CalibrateConfig", name="calibrate", sort_key=2)
app.command("jacobiflow.cli.plan:PlanConfig", name="plan", sort_key=3)
app.command("jacobiflow.cli.bench:BenchConfig", name="bench", sort_key=4)
app.command("jacobiflow.cli.evaluate:EvaluateConfig", name="evaluate", sort_key=5)
app.command("jacobiflow.cli.train:TrainConfig", name="train", sort_key=6)
app.command("jacobiflow.cli.convert:ConvertConfig", name="convert", sort_key=7)
app.command("jacobiflow.cli.info:InfoConfig", name="info", sort_key=8)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line, by default that of the process, and returns its exit code.

    Bad input ends in one line on stderr and exit code 2; `jacobiflow --traceback COMMAND` adds its traceback. The exit
    code is 130 after Ctrl-C, and 1 if stdout was closed. Other errors keep their traceback.

    Installed packages can register their own classes: modules of the entry point group "jacobiflow" are imported before
    a command runs.
    """
    # PyTorch prints a C++ backtrace when the connection to the store of the processes is lost.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    command_line = sys.argv[1:] if arguments is None else arguments
    words = [word for word in command_line if word != _TRACEBACK]
    config: Any = None
    is_first = True
    try:
        try:
            with _terminal():
                is_first = find_launch().rank == 0
                words = options.replace_renamed(words)
                if not words or words[0].startswith("-"):
                    list(app.resolved_commands())  # Imports all commands, whose summaries the help shows.
                make_config, values, _ = app.parse_args(words, print_error=False, exit_on_error=False)
                config = make_config(*values.args, **values.kwargs)
                if config is None:  # The help or the version is printed.
                    return 0
                command: Any = sys.modules[type(config).__module__]
                config.check_options()
                _prepare()
                # It needs no PyTorch, but packages that take time to import.
                from jacobiflow.utils.files import write_json

                result = command.run(config)
                if result is None:
                    return 0
                command.show(config, result)
                if config.json is not None:
                    config.json.parent.mkdir(parents=True, exist_ok=True)
                    write_json(config.json, output.to_json(config) | output.to_json(result))
                return _BAD_INPUT if getattr(result, "problems", ()) else 0
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout at exit.
            return _STDOUT_CLOSED
        except Exception as error:
            message = _describe(error, words)
            if message is None:
                raise
            if len(words) < len(command_line):
                traceback.print_exc()
            if is_first or not isinstance(error, CycloptsError):  # All processes have the same command line.
                _print_line("error", message)
            return _BAD_INPUT
    except KeyboardInterrupt:
        line = _describe_interruption(config)
        if arguments is None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # The line is printed once.
        if is_first:
            print(line, file=sys.stderr)
        return _INTERRUPTED
    finally:
        if arguments is None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C must not interrupt exit functions.


def _describe_interruption(config: Any) -> str:
    """Returns the line after Ctrl-C; what is kept is left out if it cannot be read, or after another Ctrl-C."""
    describe = getattr(sys.modules[type(config).__module__], "describe_kept", None)
    with suppress(Exception, KeyboardInterrupt):
        if describe is not None:
            return output.one_line(f"interrupted: {describe(config)}")
    return "interrupted"


@contextmanager
def _terminal() -> Iterator[None]:
    """Prints each warning in one line, and raises BrokenPipeError at the end if stdout is closed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", "--", DeprecationWarning)  # of an option
        warnings.showwarning = lambda message, *_, **__: _print_line("warning", str(message))
        yield
    sys.stdout.flush()


def _prepare() -> None:
    """Imports the modules of installed packages that register classes of their own."""
    from jacobiflow.models.memory import keep_freed_memory

    keep_freed_memory()
    for extension in options.find_extensions():
        try:
            extension.load()
        except Exception as error:  # Importing a module can raise anything.
            raise InputValueError(
                f"extension {extension.name}: cannot import {extension.value} ({type(error).__name__}: {error}); "
                "correct or uninstall the package that it is in"
            ) from error


def _describe(error: Exception, words: Sequence[str]) -> str | None:
    """Returns the message for an error of the user or the machine; `None` for a fault of the library."""
    if isinstance(error, CycloptsError):
        return f"{_describe_options(error)} See {' '.join(('jacobiflow', *(error.command_chain or ())))} --help."
    if isinstance(error, InputError):  # It names an option where the library names its argument.
        command = app.parse_commands(words)[1][-1]
        names = {option.field_info.name: option.name for option in command.assemble_argument_collection()}
        option = names.get(error.argument or "")
        return str(error) if option is None else f"{option} {error.value}: {error.message}"
    if isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY):
        remedy = "--accumulation 4, a step in four parts" if words[:1] == ["train"] else "smaller numbers"
        return f"out of memory; give a smaller --batch-size, or {remedy}"
    return str(error) if isinstance(error, OSError) else None


def _describe_options(error: CycloptsError) -> str:
    """Returns the message for options that cannot be parsed."""
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        word, path = error.unused_tokens[0], Path(error.unused_tokens[0])
        is_model = word in options.BUNDLED_MODELS or "/" in word or path.exists()
        names = ["model"] if is_model else ["prompts"] if " " in word else ["labels", "prompts"]
        is_other_folder = path.is_dir() and not (path / "config.json").exists()
        given = error.root_input_tokens or ()
        likely = [name for name in names if hasattr(error.target, name) and f"--{name}" not in given]
        choices = " or ".join(f"--{name} {quote(word)}" for name in likely)
        hint = f" Did you mean {choices}?" if choices and not is_other_folder else ""
        return f"{word}: there is no option before it.{hint}"
    if isinstance(error, UnknownOptionError) and error.app is not None:
        word = error.token.keyword or error.token.value
        names = [name for argument in error.app.assemble_argument_collection() for name in argument.names]
        return f"Unknown option: {word}.{options.suggest(word, names)}"
    if isinstance(error, MissingArgumentError) and error.argument is not None and error.app is not None:
        arguments = error.app.assemble_argument_collection(parse_docstring=True)
        first = next(i for i, argument in enumerate(arguments) if argument.name == error.argument.name)
        if error.keyword is not None:
            text = (arguments[first].parameter.help or "").partition(". ")[0].removesuffix(".")
            return f"{error.keyword} needs a value: {text}."
        tokens, hint = error.root_input_tokens or (), str(error).partition("requires an argument.")[2]
        missing = [
            argument.name if argument.index is None else argument.name.removeprefix("--").upper()
            for argument in arguments[first:] if argument.required and argument.show and argument.name not in tokens
        ]  # fmt: skip
        unknown = [word for word in error.unused_tokens or () if word.startswith("--")]
        hint = hint or "".join(f" Unknown option: {word}." for word in unknown)
        example = (error.target.__doc__ or "").partition("Example: ")[2].partition("\n")[0]
        return f"{' '.join(error.command_chain or ())} needs {' and '.join(missing)}.{hint} Example: {example}."
    return str(error)


def _print_line(kind: str, message: str) -> None:
    print(f"{kind}: {output.one_line(message)}", file=sys.stderr)
