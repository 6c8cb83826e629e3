"""The processes that share one run: those that torchrun started, or this one alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from os import environ
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from jacobiflow.checks import short
from jacobiflow.errors import InputValueError

T = TypeVar("T")
_START = "start with torchrun, or unset TORCHELASTIC_RUN_ID"
_WAIT = timedelta(hours=12)  # for the first process, which may have a strategy to plan and many checksums to compute


class FirstProcessFailed(InputValueError):  # noqa: N818  names the process at fault
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

    **Raises** `ValueError` where a variable that `torchrun` sets is missing or odd, or the processes cannot meet.
    """
    if not dist.is_torchelastic_launched():
        yield Processes()
        return
    among = _launched()
    if among.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(among.local_rank)  # else every process would also hold memory of the first GPU
    try:
        dist.init_process_group("gloo", timeout=_WAIT)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        where = f"MASTER_ADDR {environ['MASTER_ADDR']}, MASTER_PORT {environ['MASTER_PORT']}"
        raise InputValueError(
            f"{where}: the processes cannot meet there ({reason}); {_START}, with a free port"
        ) from error
    try:
        yield among
    finally:
        dist.destroy_process_group()


def _launched() -> Processes:
    """This process by the variables of `torchrun`. **Raises** `ValueError` that names one that is missing or odd."""
    count = _variable("WORLD_SIZE", 1)
    rank = _variable("RANK", 0, count - 1)
    local = _variable("LOCAL_RANK", 0, rank)
    _variable("MASTER_PORT", 0, 65535)
    if not environ.get("MASTER_ADDR"):
        raise InputValueError(f"MASTER_ADDR is not set; {_START}")
    return Processes(rank, count, local)


def _variable(name: str, least: int, most: int = 2**31) -> int:
    text = environ.get(name)
    if text is None:
        raise InputValueError(f"{name} is not set, though TORCHELASTIC_RUN_ID is; {_START}")
    if not re.fullmatch("[0-9]{1,10}", text) or not least <= int(text) <= most:
        raise InputValueError(f"{name} is {short(text)}, not a whole number from {least} to {most}; {_START}")
    return int(text)
