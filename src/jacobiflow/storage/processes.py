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

T = TypeVar("T")
_WAIT = timedelta(hours=12)  # for the first process, which may have a strategy to plan and many checksums to compute


class FirstProcessFailed(ValueError):  # noqa: N818  names the process at fault
    """Raised in the other processes where the first one raised an error, with that error's message."""


@dataclass(frozen=True)
class Processes:
    """This process, `rank` of `count`; `local_rank` counts those of its machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    def once(self, work: Callable[[], T]) -> T:
        """Calls `work` in the first process, and returns its result in all of them.

        **Raises** what `work` raises, in the first process; `FirstProcessFailed` in the others.
        """
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
        """The device that `name` means for this process: "cuda" is the GPU of its local rank."""
        return f"cuda:{self.local_rank}" if name == "cuda" and self.count > 1 else name


@contextmanager
def processes() -> Iterator[Processes]:
    """This process among those that `torchrun` started (see `torch.distributed`), or alone where it did not.

    Only lists of shards go between processes, over gloo; images go to the folder.
    """
    if not dist.is_torchelastic_launched():
        yield Processes()
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, timeout=_WAIT)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), int(environ["LOCAL_RANK"]))
    finally:
        dist.destroy_process_group()
