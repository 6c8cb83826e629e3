"""A stand-in for `srun --kill-on-bad-exit=1`: `python -m tests.helpers.srun TASKS MODULE ARGUMENTS`.

As SLURM does, it kills the other tasks once one has failed, and returns the largest exit code of all tasks. It imports
the package once and forks each task, since an import takes seconds.
"""

from __future__ import annotations

import os
import runpy
import signal
import socket
import sys

import torch.utils.tensorboard  # noqa: F401

import jacobiflow.training.trainer  # noqa: F401


def main() -> None:
    count, sys.argv = int(sys.argv[1]), sys.argv[2:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tasks = []
    for task in range(count):
        tasks.append(os.fork())
        if not tasks[-1]:
            os.environ |= {
                "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task), "SLURM_STEP_NUM_TASKS": str(count),
                "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(port),
            }  # fmt: skip
            runpy.run_module(sys.argv[0], run_name="__main__")
            return
    code = 0
    while tasks:
        task, status = os.wait()
        tasks.remove(task)
        own_code = os.waitstatus_to_exitcode(status)
        code = max(code, own_code if own_code >= 0 else 128 - own_code)
        for other in tasks if code else ():
            os.kill(other, signal.SIGKILL)
    sys.exit(code)


if __name__ == "__main__":
    main()
