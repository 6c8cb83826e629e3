"""What the command line needs before anything else is imported: an answer to Ctrl-C, and three open streams.

Importing PyTorch takes seconds. So the package imports this module first, which acts where the process is
`jacobiflow` or `python -m jacobiflow`, and does nothing in a program that imports the package.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

INTERRUPTED = 130  # as shells have it


def leave(*_: object) -> NoReturn:
    """End the process at once, with one line."""
    with suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


@contextmanager
def interruptible() -> Iterator[None]:
    """The first Ctrl-C raises `KeyboardInterrupt`, so that work is left in order; the second does not wait for that."""
    before = signal.getsignal(signal.SIGINT)
    if before not in (signal.default_int_handler, leave) or threading.current_thread() is not threading.main_thread():
        yield  # it is ignored, or the program has an answer of its own
        return

    def interrupt(*_: object) -> NoReturn:
        signal.signal(signal.SIGINT, leave)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _is_command() -> bool:
    name, *arguments = getattr(sys, "argv", None) or [""]
    if name != "-m":  # which Python says while it imports the package
        return os.path.splitext(os.path.basename(name))[0] == "jacobiflow"
    return sys.orig_argv[-len(arguments) - 1].removeprefix("-m") == "jacobiflow"


def _begin() -> None:
    # A closed stream's number would go to the next file that is opened, and messages into that file.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  for good
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)


if _is_command():
    _begin()
