"""Runs `jacobiflow sample` in two processes that find each other as those of torchrun do: for test_processes.py.

`python two_processes.py FOLDER OPTIONS...` runs the command three times: in the first run the second process kills
itself (SIGKILL) in the middle, before it gives a file its name, and the first process is killed then, as torchrun does;
the second run resumes; the third one has another seed. The processes are forked from this one, so that torch is
imported once. Prints as JSON what each run printed, how its processes ended, and the shards that were there after it.
FOLDER is for what they print.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import jacobiflow as jf
from jacobiflow.cli import main

LAST = 6  # the file that is not written: the record of the third shard


def start(rank: int, port: int, folder: Path, options: list[str], last: int | None) -> int:
    """Fork a process of that rank, which kills itself at its file number `last`."""
    child = os.fork()
    if child:
        return child
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
    rename, count, status = os.replace, 0, 1

    def replace(*names: Any) -> None:
        nonlocal count
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*names)

    os.replace = replace  # type: ignore[assignment]
    try:
        main(options)
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(folder: Path, options: list[str], last: int | None = None) -> dict[str, Any]:
    """Both processes, to their end, which for the second one is its file number `last`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first, second = start(0, port, folder, options, None), start(1, port, folder, options, last)
    end = os.waitpid(second, 0)[1]
    if last is not None:
        os.kill(first, signal.SIGKILL)
    ends = [os.waitstatus_to_exitcode(status) for status in (os.waitpid(first, 0)[1], end)]
    shards = Path(options[options.index("--out") + 1]) / "shards"
    return {
        "ends": ends,
        "printed": [[(folder / f"{name}{rank}").read_text() for name in ("out", "err")] for rank in (0, 1)],
        "times": {path.stem: path.stat().st_mtime_ns for path in shards.glob("*.json")},
    }


if __name__ == "__main__":
    place, words = Path(sys.argv[1]), sys.argv[2:]
    jf.sample(jf.load("digits-p1"), 1, strategy="jacobi-1", progress=False)  # so that no run pays for first use
    print(json.dumps([run(place, words, LAST), run(place, words), run(place, [*words, "--seed", "5"])]))
