"""Processes that share a job, started by torchrun or by SLURM's srun, on one machine or several."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from jacobiflow.distributed.launch import Launch, find_launch
from jacobiflow.distributed.watch import ProcessFailed, Watch, message_of
from jacobiflow.errors import InputValueError, first_line

T = TypeVar("T")
R = TypeVar("R")

_TIMEOUT = timedelta(hours=12)  # Longest wait for a process that is alive; the first one may plan or verify for hours.
_START_TIMEOUT = timedelta(minutes=5)  # Longest wait until all processes have started.


@dataclass(frozen=True)
class Processes:
    """The processes that share a job, and the rank of this one.

    All processes call the methods that communicate in the same order; `device` does not communicate.

    Attributes:
        rank: Number of this process, from 0.
        count: Number of processes.
        local_rank: Number of this process on its machine, from 0.
        store: The key-value store of the processes; None for one process.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    store: Any = field(default=None, repr=False, compare=False)
    _claims: Iterator[int] = field(default_factory=itertools.count, init=False, repr=False, compare=False)

    def run_on_rank_zero(self, work: Callable[[], T]) -> T:
        """Calls `work` in the first process only, and returns its result in every process.

        Raises:
            ProcessFailed: In the other processes, if `work` raises an exception in the first process.
        """
        if self.count == 1:
            return work()
        message: list[Any] = [None, None]  # The result, and the text of an exception.
        if self.rank == 0:
            try:
                message[0] = work()
            except Exception as error:
                dist.broadcast_object_list([None, message_of(error)], src=0)
                raise
        dist.broadcast_object_list(message, src=0)
        result, error_text = message
        if error_text is not None:
            raise ProcessFailed(error_text, is_reported=True)
        return result

    def gather(self, value: T) -> list[T]:
        """Returns the values of all processes in every process, in the order of the ranks."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def map(self, work: Callable[[T], R], units: Sequence[T]) -> Iterator[R]:
        """Yields the results of `work` for all units in every process. Each process computes those that it claims."""
        if self.count == 1:
            yield from map(work, units)
            return
        results = {index: work(units[index]) for index in self.claim(range(len(units)))}
        for others in self.gather(results):
            results |= others
        yield from (results[index] for index in range(len(units)))

    def claim(self, units: Sequence[T]) -> Iterator[T]:
        """Yields the units of work for this process. A free process takes the next unit, so costs may differ.

        Example:
            >>> from jacobiflow.distributed import processes
            >>> with processes() as group:
            ...     list(group.claim(["shard 0", "shard 1"]))
            ['shard 0', 'shard 1']
        """
        if self.store is None:
            yield from units[self.rank :: self.count]
            return
        key = f"claim {next(self._claims)}"
        while (index := self.store.add(key, 1) - 1) < len(units):
            yield units[index]

    def check_sees(self, path: Path) -> None:
        """Raises InputValueError if this process does not see a file that the first one has written."""
        if not path.exists():
            raise InputValueError(f"{path.parent}: process {self.rank} does not see it; give one on a shared disk")

    def device(self, name: str) -> str:
        """Returns the device of this process: "cuda" becomes the GPU with the local rank."""
        if name != "cuda" or self.count == 1 or not torch.cuda.is_available():
            return name
        index = self.local_rank % torch.cuda.device_count()  # A launcher may show each process only one GPU.
        torch.cuda.set_device(index)  # Without it every process would allocate memory on the first GPU.
        return f"cuda:{index}"


_blocks = itertools.count()  # Each block of `processes` in a program has keys of its own.


@cache
def _connect(launch: Launch) -> tuple[TCPStore, TCPStore]:
    """Connects to the store, twice, until the program ends."""
    socket.getaddrinfo(launch.host, launch.port)  # The store would try an unknown name again for minutes.
    connect = partial(TCPStore, timeout=_START_TIMEOUT, wait_for_workers=False, multi_tenant=True)
    connection = connect(launch.host, launch.port, is_master=launch.hosts_store)
    return connection, connect(launch.host, connection.port, is_master=False)


@contextmanager
def processes() -> Iterator[Processes]:
    """Connects the processes that `torchrun` or SLURM's `srun` started; without them, this process is alone.

    If one process raises an error or is killed, the others end within seconds, by `ProcessFailed`.

    Raises:
        ProcessFailed: If another process failed.

    Example:
        >>> from jacobiflow.distributed import processes
        >>> with processes() as group:
        ...     group.rank, group.count
        (0, 1)
    """
    launch = find_launch(os.environ)
    if launch is None:
        yield Processes()
        return
    try:
        prefix = f"{launch.attempt} {next(_blocks)}"
        store, watch_store = (PrefixStore(prefix, each) for each in _connect(launch))
        store.set(f"started {launch.rank}", "")
        store.wait([f"started {rank}" for rank in range(launch.count)])
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(
            backend, store=PrefixStore("group", store), rank=launch.rank, world_size=launch.count, timeout=_TIMEOUT
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputValueError(
            f"process {launch.rank} of {launch.count} cannot reach the others by {launch.host}:{launch.port} "
            f"({first_line(error)}); check that all were started, and MASTER_ADDR and MASTER_PORT"
        ) from error
    watch = Watch(watch_store, launch.rank, launch.count)
    watch.start()
    try:
        yield Processes(launch.rank, launch.count, launch.local_rank, PrefixStore("work", store))
        dist.barrier()
    except BaseException as error:
        watch.raise_failure(error)
        raise
    finally:
        watch.stop()
    dist.destroy_process_group()
