"""The command line: `jacobiflow` or `python -m jacobiflow`."""

from __future__ import annotations

import os
import signal
import sys


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line, by default that of the process, and returns its exit code.

    Bad input ends in one line on stderr and exit code 2; `jacobiflow --traceback COMMAND` adds its traceback. The exit
    code is 130 after Ctrl-C, and 1 if stdout was closed. Other errors keep their traceback.

    Installed packages can register their own classes: modules of the entry point group "jacobiflow" are imported before
    a command runs.
    """
    # PyTorch prints a C++ backtrace when the connection to the store of the processes is lost.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        from jacobiflow.cli.app import run

        return run(sys.argv[1:] if arguments is None else arguments)
    except ModuleNotFoundError as error:
        if error.name != "cyclopts":
            raise
        print("error: the command line needs more packages: pip install 'jacobiflow[cli]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # A second Ctrl-C, while the first one is handled.
        return 130
    finally:
        if arguments is None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C must not interrupt exit functions.
