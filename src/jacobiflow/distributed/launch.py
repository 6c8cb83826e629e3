"""The rank of this process, and the address of the others, from the variables of torchrun or SLURM's srun."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from jacobiflow.errors import InputValueError

_SLURM_PORTS = range(20_000, 30_000)
_REMEDY = (
    "start the processes by torchrun or srun, or unset TORCHELASTIC_RUN_ID and SLURM_STEP_NUM_TASKS for one process"
)


@dataclass(frozen=True)
class Launch:
    """The rank of this process, and the address of the store.

    Attributes:
        hosts_store: Whether this process keeps the store.
        attempt: Number of times that torchrun has restarted the processes.
    """

    rank: int
    count: int
    local_rank: int
    host: str
    port: int
    hosts_store: bool
    attempt: str = "0"

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.count:
            raise InputValueError(
                f"rank {self.rank} of {self.count} processes, by RANK and WORLD_SIZE, or SLURM_PROCID and "
                f"SLURM_STEP_NUM_TASKS: ranks count from 0; {_REMEDY}"
            )
        if not 0 <= self.port < 2**16:
            raise InputValueError(f"MASTER_PORT={self.port}: give a port from 1 to 65535, or unset it under srun")


def find_launch(variables: Mapping[str, str]) -> Launch | None:
    """Reads the variables of torchrun or srun; None if neither started this process."""
    tasks = variables.get("SLURM_STEP_NUM_TASKS", "1")
    try:
        if "TORCHELASTIC_RUN_ID" in variables:
            machines = variables.get("GROUP_WORLD_SIZE", "1")
            if int(tasks) > 1 and tasks != machines:
                raise InputValueError(
                    f"srun started {tasks} tasks, and torchrun connects {machines} of them; give torchrun "
                    f"--nnodes {tasks}, or leave torchrun out"
                )
            rank, hosts_store = int(variables["RANK"]), variables.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            return Launch(
                rank, int(variables["WORLD_SIZE"]), int(variables["LOCAL_RANK"]), variables["MASTER_ADDR"],
                int(variables["MASTER_PORT"]), rank == 0 and hosts_store,
                variables.get("TORCHELASTIC_RESTART_COUNT", "0"),
            )  # fmt: skip
        if int(tasks) == 1:
            return None
        rank = int(variables["SLURM_PROCID"])
        number = 37 * int(variables["SLURM_JOB_ID"]) + int(variables["SLURM_STEP_ID"])
        host = variables.get("MASTER_ADDR") or first_host(variables["SLURM_STEP_NODELIST"])
        port = int(variables.get("MASTER_PORT") or _SLURM_PORTS[number % len(_SLURM_PORTS)])
        return Launch(rank, int(tasks), int(variables["SLURM_LOCALID"]), host, port, rank == 0)
    except KeyError as error:
        raise InputValueError(f"{error.args[0]} is not set; {_REMEDY}") from error
    except ValueError as error:
        if isinstance(error, InputValueError):
            raise
        raise InputValueError(f"a variable of torchrun or srun is not a number ({error}); start them again") from error


def first_host(nodes: str) -> str:
    """Returns the first host of a SLURM node list: "gpu[03-07,9],login1" gives "gpu03"."""
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if match is None:
        raise InputValueError(f"SLURM_STEP_NODELIST={nodes!r} names no machine; set MASTER_ADDR to that of process 0")
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", match[0])
