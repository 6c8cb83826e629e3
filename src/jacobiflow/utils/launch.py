"""Rank and device of this process, which torchrun or SLURM's srun may have started."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from jacobiflow.errors import InputValueError

_TORCHRUN, _SRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")


@dataclass(frozen=True)
class Launch:
    """Rank of a process.

    Attributes:
        rank: Number of the process, from 0.
        count: Number of processes.
        local_rank: Number of the process on its machine, from 0.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0


def find_launch(variables: Mapping[str, str] = os.environ) -> Launch:
    """Reads the environment variables of torchrun, or those of srun; without them there is one process.

    Raises:
        InputValueError: If one of them is missing or is not a number.
    """
    for names in (_TORCHRUN, _SRUN):
        if names[1] in variables:
            try:
                return Launch(*(int(variables[name]) for name in names))
            except (KeyError, ValueError) as error:
                raise InputValueError(
                    f"{', '.join(names)}: missing or not numbers ({error}); start the processes by torchrun or srun, "
                    f"or unset {names[1]} for one process"
                ) from error
    return Launch()


def count_slurm_tasks(variables: Mapping[str, str] = os.environ) -> int:
    """Returns the number of tasks of this SLURM job, which only srun starts; 1 outside of SLURM."""
    return int(variables.get("SLURM_NTASKS", "1"))


def local_device(name: str) -> str:
    """Returns the device of this process.

    "auto" is a CUDA GPU if there is one, else the CPU. "cuda" is a GPU of its own if there are several processes.
    """
    import torch

    launch, has_gpu = find_launch(), torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if has_gpu else "cpu"
    if name != "cuda" or launch.count == 1 or not has_gpu:
        return name
    index = launch.local_rank % torch.cuda.device_count()  # A launcher may show each process only one GPU.
    torch.cuda.set_device(index)  # Without it every process would allocate memory on the first GPU.
    return f"cuda:{index}"
