"""The library's messages in the words of the command line: `batch_size=0: ...` becomes `--batch-size 0: ...`.

The library names its arguments as `name=value`. An option means the same in every command, so the options of all
commands serve each of them. Text that the user typed, such as a folder named seed=3, stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from typer.core import TyperGroup, TyperOption

_ARGUMENT = re.compile(r"(?<![^\s(])([a-z_0-9]+)=('[^']*'|[^\s;:,)]+)")
_LONGEST = 300  # characters of a message
_OTHER_NAMES = {"num_blocks": "blocks", "layers_per_block": "layers", "in_channels": "image_channels"}


def one_line(message: str) -> str:
    """`message` in one line; a long one is cut in the middle, as the remedy stands at its end."""
    line = " ".join(message.split())
    if len(line) <= _LONGEST:
        return line
    half = (_LONGEST - len(" ... ")) // 2
    return f"{line[:half]} ... {line[-half:]}"


def in_options(message: str, commands: TyperGroup, arguments: Sequence[str]) -> str:
    """`message` with `--name value` for every `name=value` that an option sets and that `arguments` do not contain."""
    parameters = [parameter for command in commands.commands.values() for parameter in command.params]
    options = {option.name: option for option in parameters if isinstance(option, TyperOption)}
    typed_values = [text.partition("=")[2] if text.startswith("--") else text for text in arguments]

    def typed(match: re.Match[str]) -> str:
        name, value = match.groups()
        option = options.get(_OTHER_NAMES.get(name, name))
        if option is None or any(match[0] in text for text in typed_values):
            return match[0]
        if not option.is_flag:
            return f"{option.opts[0]} {value.strip(chr(39))}"
        flags = option.opts if value == "True" else option.secondary_opts  # --certify, --no-certify
        return flags[0] if flags else match[0]

    return _ARGUMENT.sub(typed, message)
