"""The processes that share one run: those that torchrun started, or this one alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from os import environ
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from jacobiflow.errors import InputValueError

T = TypeVar("T")
_WAIT = timedelta(hours=12)  # for the first process, which may have a strategy to plan and many checksums to compute


class FirstProcessFailed(InputValueError):  # noqa: N818  names the process at fault
    """The first process raised an error with this message, which it shows itself."""


@dataclass(frozen=True)
class Processes:
    """This process, number `rank` of `count`; `local_rank` is its number on its machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    def on_first(self, work: Callable[[], T]) -> T:
        """Calls `work` in the first process; returns its result in all of them, or raises FirstProcessFailed."""
        if self.count == 1:
            return work()
        answer: list[Any] = [None, None]  # the result, and the message of an error
        if self.rank == 0:
            try:
                answer[0] = work()
            except Exception as error:
                dist.broadcast_object_list([None, str(error) or type(error).__name__], src=0)
                raise
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise FirstProcessFailed(answer[1])
        return answer[0]

    def device(self, name: str) -> str:
        """Returns the device for this process: "cuda" is the GPU of its local rank."""
        return f"cuda:{self.local_rank}" if name == "cuda" and self.count > 1 else name


@contextmanager
def processes() -> Iterator[Processes]:
    """Connects the processes that `torchrun` started, for `sample_to_folder`; without it, this process is alone.

    Example:
        >>> import jacobiflow as jf
        >>> with jf.processes() as processes:
        ...     processes.rank, processes.count
        (0, 1)
    """
    if not dist.is_torchelastic_launched():
        yield Processes()
        return
    dist.init_process_group("gloo", timeout=_WAIT)
    try:
        this = Processes(dist.get_rank(), dist.get_world_size(), int(environ["LOCAL_RANK"]))
        if this.local_rank < torch.cuda.device_count():
            torch.cuda.set_device(this.local_rank)  # else every process would also hold memory of the first GPU
        yield this
    finally:
        dist.destroy_process_group()
