"""The console script `jacobiflow`, and `python -m jacobiflow`."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt. During an import it ends the process: NumPy and PyTorch would catch the exception."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os.write(2, b"interrupted\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # It is another one in the background.
    signal.signal(signal.SIGINT, _interrupt)

from jacobiflow.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
