"""Commands that several processes can share: a config, a function that runs it, and one that prints the result."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

from typer import Exit, Option

if TYPE_CHECKING:
    from jacobiflow.distributed import Processes

Config = TypeVar("Config")
Result = TypeVar("Result")


class Interrupted(Exception):  # noqa: N818 - no error, but the end of a command
    """Ctrl-C has ended a command; the message says what is left, and how to go on."""


def as_command(
    config_type: type[Config],
    run: Callable[[Config, Processes], Result | None],
    show: Callable[[Result], None],
    describe_kept: Callable[[Config], str] | None = None,
) -> Callable[..., dict[str, Any] | None]:
    """Returns the command that makes a config from its options, runs it in every process, and prints the result in one.

    Args:
        config_type: A dataclass. Its fields become the options, with their defaults. A field that is a dataclass stands
            for options of its own, whose help is its docstring, in the group of the field.
        run: Does the work of one process. It returns the result in the first process: a dataclass, perhaps with a
            method `to_json`. Its docstring is the help of the command.
        show: Prints the result.
        describe_kept: Describes what Ctrl-C leaves of a run, and how to go on; without it, nothing is left.
    """

    def command(**arguments: Any) -> dict[str, Any] | None:
        from jacobiflow.distributed import ProcessFailed, processes

        config = _build(config_type, arguments)
        try:
            with processes() as group:
                result = run(config, group)
        except KeyboardInterrupt as error:
            raise Interrupted("" if describe_kept is None else describe_kept(config)) from error
        except ProcessFailed as error:
            if error.is_reported:
                raise Exit(2) from None
            raise
        if result is None or group.rank > 0:
            return None
        show(result)
        to_json = getattr(result, "to_json", None)
        return asdict(result) if to_json is None else to_json()  # type: ignore[call-overload]

    command.__doc__ = run.__doc__
    command.__signature__ = inspect.Signature([*_parameters(config_type)])  # type: ignore[attr-defined]
    return command


def _parameters(config_type: Any, group: str | None = None) -> Iterator[inspect.Parameter]:
    """Yields a keyword parameter for each field of a config, and for each field of the configs in it."""
    types, help_texts = get_type_hints(config_type, include_extras=True), _help_texts(config_type)
    for entry in fields(config_type):
        kind = types[entry.name]
        if not hasattr(kind, "__metadata__"):
            kind = Annotated[kind, Option(help=help_texts[entry.name], rich_help_panel=group)]
        config: Any = kind.__origin__
        if is_dataclass(config):
            yield from _parameters(config, kind.__metadata__[0].rich_help_panel)
            continue
        default = inspect.Parameter.empty if entry.default is MISSING else entry.default
        yield inspect.Parameter(entry.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _help_texts(config_type: type) -> dict[str, str]:
    """Returns the descriptions in the `Args:` section of a class's docstring, by the names of the fields."""
    _, _, section = (inspect.getdoc(config_type) or "").partition("Args:\n")
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section.partition("\n\n")[0], re.MULTILINE)
    return {name: " ".join(text.replace("`", "").split()) for name, text in entries}


def _build(config_type: type, arguments: dict[str, Any]) -> Any:
    """Builds a config from the values of its options, and of those of the configs in it."""
    types = get_type_hints(config_type)
    return config_type(
        **{
            entry.name: _build(types[entry.name], arguments)
            if is_dataclass(types[entry.name])
            else arguments[entry.name]
            for entry in fields(config_type)
        }
    )
