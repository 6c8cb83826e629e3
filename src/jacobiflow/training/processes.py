"""The processes that train a flow together: those of `torch.distributed`, or this one alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from jacobiflow.errors import InputValueError, first_line
from jacobiflow.utils.launch import find_launch

_TIMEOUT = timedelta(minutes=30)  # Longest wait for another process: it may start late, or draw samples.
_SLURM_PORTS = range(20_000, 30_000)


@contextmanager
def process_group() -> Iterator[None]:
    """Initializes `torch.distributed` for processes that torchrun or SLURM's srun started; does nothing for one.

    If a process ends by an error, its launcher ends the others: torchrun, and srun with `--kill-on-bad-exit=1`.

    Raises:
        InputValueError: If the other processes cannot be reached, or if one of them has ended.
    """
    launch = find_launch()
    if launch.count == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    name = f"process {launch.rank} of {launch.count}"
    try:
        if "WORLD_SIZE" not in os.environ:
            _set_slurm_address()
        dist.init_process_group(backend, timeout=_TIMEOUT, rank=launch.rank, world_size=launch.count)
    except (LookupError, OSError, ValueError, RuntimeError) as error:
        raise InputValueError(
            f"{name} cannot reach the others ({first_line(error)}); check that all were started, and MASTER_ADDR and "
            "MASTER_PORT"
        ) from error
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise InputValueError(
                f"{name} has lost another process; if that one printed no error, it may have been killed: run the same "
                "command again, which resumes"
            ) from error
        raise
    dist.destroy_process_group()  # After an error the others are connected until this process has printed it.


def _set_slurm_address() -> None:
    """Sets MASTER_ADDR to the first host of the job step, and MASTER_PORT by its number, unless they are set."""
    variables = os.environ
    host = re.match(r"(?:[^,\[]|\[[^]]*\])*", variables["SLURM_STEP_NODELIST"])  # "gpu[03-07,9],login1": "gpu[03-07,9]"
    number = 37 * int(variables["SLURM_JOB_ID"]) + int(variables["SLURM_STEP_ID"])
    variables.setdefault("MASTER_ADDR", re.sub(r"\[([^],-]*)[^]]*\]", r"\1", host[0] if host else ""))  # "gpu03"
    variables.setdefault("MASTER_PORT", str(_SLURM_PORTS[number % len(_SLURM_PORTS)]))


def rank() -> int:
    """Returns the rank of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Returns the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Waits for all processes."""
    if dist.is_initialized():
        dist.barrier()
