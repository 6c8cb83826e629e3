"""The command line: `jacobiflow` or `python -m jacobiflow`."""

from __future__ import annotations

import signal
import sys


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line, by default that of the process, and returns its exit code.

    It is 2 with one line on bad input, 130 when interrupted, and 1 if the reader of stdout is gone. A fault of the
    library keeps its traceback; `jacobiflow --traceback COMMAND` shows that of bad input too.

    Modules that installed packages name as entry points of the group "jacobiflow" are imported before a command runs;
    all commands take what they register.
    """
    try:
        from jacobiflow.cli.app import run

        return run(sys.argv[1:] if arguments is None else arguments)
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        print("error: the command line needs more packages: pip install 'jacobiflow[cli]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # a second Ctrl-C, while the first was handled
        return 130
    finally:
        if arguments is None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # or exit functions would be interrupted, with a traceback
