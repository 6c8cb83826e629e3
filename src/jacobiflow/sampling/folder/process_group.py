"""The processes that share the drawing of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from os import environ
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from jacobiflow.errors import InputValueError, first_line

_TIMEOUT = timedelta(hours=12)  # Longest wait for the first process, which may plan a strategy and verify many shards.

T = TypeVar("T")


class FirstProcessFailed(InputValueError):  # noqa: N818
    """The first process raised an error; this one has the same message."""


@dataclass(frozen=True)
class Processes:
    """The number of processes, and the place of this process among them.

    Attributes:
        rank: Number of this process, from 0.
        count: Number of processes.
        local_rank: Number of this process on its machine, from 0.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    def run_on_rank_zero(self, work: Callable[[], T]) -> T:
        """Calls `work` in the first process only, and returns its result in every process.

        Raises:
            FirstProcessFailed: In the other processes, if `work` raises an exception in the first process.
        """
        if self.count == 1:
            return work()
        message: list[Any] = [None, None]  # The result, and the text of an exception.
        if self.rank == 0:
            try:
                message[0] = work()
            except Exception as error:
                dist.broadcast_object_list([None, str(error) or type(error).__name__], src=0)
                raise
        dist.broadcast_object_list(message, src=0)
        result, error_text = message
        if error_text is not None:
            raise FirstProcessFailed(error_text)
        return result

    def device(self, name: str) -> str:
        """Returns the device of this process: "cuda" becomes the GPU with the local rank."""
        if name != "cuda" or self.count == 1 or not torch.cuda.is_available():
            return name
        index = self.local_rank % torch.cuda.device_count()  # A launcher may show each process only one GPU.
        torch.cuda.set_device(index)  # Without it every process would allocate memory on the first GPU.
        return f"cuda:{index}"


SINGLE_PROCESS = Processes()


@contextmanager
def processes() -> Iterator[Processes]:
    """Connects the processes that `torchrun` started, for `sample_to_folder`; without it, this process is alone.

    `processes.device("cuda")` is the GPU of this process.

    Example:
        >>> import jacobiflow as jf
        >>> with jf.processes() as processes:
        ...     processes.rank, processes.count
        (0, 1)
    """
    if not dist.is_torchelastic_launched():
        yield SINGLE_PROCESS
        return
    try:
        local_rank = int(environ["LOCAL_RANK"])
        dist.init_process_group("gloo", timeout=_TIMEOUT)
    except (KeyError, ValueError, dist.DistError) as error:
        raise InputValueError(
            f"torchrun's variables are incomplete or wrong ({first_line(error)}); start the processes by torchrun, "
            "or unset TORCHELASTIC_RUN_ID for one process"
        ) from error
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), local_rank)
    finally:
        dist.destroy_process_group()
