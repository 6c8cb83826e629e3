"""Processes that share a job, started by torchrun or by SLURM's srun, on one machine or several."""

from __future__ import annotations

import itertools
import os
import queue
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from jacobiflow.errors import InputValueError, first_line

T = TypeVar("T")
R = TypeVar("R")

_TIMEOUT = timedelta(hours=12)  # Longest wait for a process that is alive; the first one may plan or verify for hours.
_START_TIMEOUT = timedelta(minutes=5)  # Longest wait until all processes have started.
_BEAT = 0.5  # Seconds between two signs of life of a process.
_SILENCE = 15.0  # Seconds without a sign of life after which a process counts as ended.
_GRACE = 5.0  # Seconds in which the main thread must end after another process has failed.
_SLURM_PORTS = range(20_000, 30_000)
_FAILURE = "failure"  # The key of the first failure in the store.


class ProcessFailed(InputValueError):  # noqa: N818
    """Another process failed, so this one stopped too.

    Attributes:
        is_reported: Whether another process prints the message.
    """

    def __init__(self, message: str, is_reported: bool) -> None:
        super().__init__(message)
        self.is_reported = is_reported


@dataclass(frozen=True)
class Processes:
    """The processes that share a job, and the place of this one among them.

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
                dist.broadcast_object_list([None, _message(error)], src=0)
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

    def any(self, flag: bool) -> bool:
        """Tells every process whether `flag` is true in at least one of them."""
        return max(self.gather(flag))

    def map(self, work: Callable[[T], R], units: Sequence[T]) -> list[R]:
        """Returns the results of `work` for all units in every process. Each process computes those that it claims."""
        results = {index: work(units[index]) for index in self.claim(range(len(units)))}
        for others in self.gather(results):
            results |= others
        return [results[index] for index in range(len(units))]

    def claim(self, units: Sequence[T]) -> Iterator[T]:
        """Yields the units of work for this process. A free process takes the next unit, so costs may differ.

        Example:
            >>> import jacobiflow as jf
            >>> with jf.processes() as processes:
            ...     list(processes.claim(["shard 0", "shard 1"]))
            ['shard 0', 'shard 1']
        """
        if self.store is None:
            yield from units[self.rank :: self.count]
            return
        key = f"claim {next(self._claims)}"
        while (index := self.store.add(key, 1) - 1) < len(units):
            yield units[index]

    def device(self, name: str) -> str:
        """Returns the device of this process: "cuda" becomes the GPU with the local rank."""
        if name != "cuda" or self.count == 1 or not torch.cuda.is_available():
            return name
        index = self.local_rank % torch.cuda.device_count()  # A launcher may show each process only one GPU.
        torch.cuda.set_device(index)  # Without it every process would allocate memory on the first GPU.
        return f"cuda:{index}"


@contextmanager
def processes() -> Iterator[Processes]:
    """Connects the processes that `torchrun` or SLURM's `srun` started; without them, this process is alone.

    If one process raises an error or is killed, the others end within seconds, by `ProcessFailed`.

    Raises:
        ProcessFailed: If another process failed.

    Example:
        >>> import jacobiflow as jf
        >>> with jf.processes() as processes:
        ...     processes.rank, processes.count
        (0, 1)
    """
    launch = _find_launch(os.environ)
    if launch is None:
        yield Processes()
        return
    try:
        connection = _connect(launch.host, launch.port, launch.hosts_store)
        watch_connection = _connect(launch.host, connection.port, hosts=False)
        store, watch_store = (_with_prefix(launch.attempt, each) for each in (connection, watch_connection))
        store.set(f"started {launch.rank}", "")
        store.wait([f"started {rank}" for rank in range(launch.count)])
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(
            backend, store=_with_prefix("group", store), rank=launch.rank, world_size=launch.count, timeout=_TIMEOUT
        )
    except (ValueError, RuntimeError) as error:
        raise InputValueError(
            f"process {launch.rank} of {launch.count} cannot reach the others by {launch.host}:{launch.port} "
            f"({first_line(error)}); check that all were started, and MASTER_ADDR and MASTER_PORT"
        ) from error
    watch = _Watch(watch_store, launch.rank, launch.count)
    watch.start()
    try:
        yield Processes(launch.rank, launch.count, launch.local_rank, _with_prefix("work", store))
        dist.barrier()
    except BaseException as error:
        watch.raise_failure(error)
        raise
    finally:
        watch.stop()
    dist.destroy_process_group()


@dataclass(frozen=True)
class _Launch:
    """The place of this process, and the address of the store.

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


def _find_launch(variables: Mapping[str, str]) -> _Launch | None:
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
            return _Launch(
                rank, int(variables["WORLD_SIZE"]), int(variables["LOCAL_RANK"]), variables["MASTER_ADDR"],
                int(variables["MASTER_PORT"]), rank == 0 and hosts_store,
                variables.get("TORCHELASTIC_RESTART_COUNT", "0"),
            )  # fmt: skip
        if int(tasks) == 1:
            return None
        rank = int(variables["SLURM_PROCID"])
        number = 37 * int(variables["SLURM_JOB_ID"]) + int(variables["SLURM_STEP_ID"])
        host = variables.get("MASTER_ADDR") or _first_host(variables["SLURM_STEP_NODELIST"])
        port = int(variables.get("MASTER_PORT") or _SLURM_PORTS[number % len(_SLURM_PORTS)])
        return _Launch(rank, int(tasks), int(variables["SLURM_LOCALID"]), host, port, rank == 0)
    except KeyError as error:
        raise InputValueError(
            f"{error.args[0]} is not set; start the processes by torchrun or srun, or unset TORCHELASTIC_RUN_ID and "
            "SLURM_STEP_NUM_TASKS for one process"
        ) from error
    except ValueError as error:
        if isinstance(error, InputValueError):
            raise
        raise InputValueError(f"a variable of torchrun or srun is not a number ({error}); start them again") from error


def _first_host(nodes: str) -> str:
    """Returns the first host of a SLURM node list: "gpu[03-07,9],login1" gives "gpu03"."""
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if match is None:
        raise InputValueError(f"SLURM_STEP_NODELIST={nodes!r} names no machine; set MASTER_ADDR to that of process 0")
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", match[0])


def _connect(host: str, port: int, hosts: bool) -> Any:
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, port, is_master=hosts, timeout=_START_TIMEOUT, wait_for_workers=False, multi_tenant=True
    )


def _with_prefix(prefix: str, store: Any) -> Any:
    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]


class _Watch:
    """Ends this process if another one has failed, ended or hangs.

    The first process watches all others, and they watch the first one. One thread talks to the store, and another one
    waits for its answers, since the process that keeps the store may hang, too.
    """

    def __init__(self, store: Any, rank: int, count: int) -> None:
        self._store, self._rank, self._count = store, rank, count
        self._watched = range(1, count) if rank == 0 else range(1)
        self._beats: dict[int, tuple[int, float]] = {}  # The last count of signs of life, and when it changed.
        self._answers: queue.Queue[ProcessFailed | None] = queue.Queue()
        self._failure: ProcessFailed | None = None
        self._stopped = threading.Event()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Starts the threads."""
        for work in (self._ask, self._watch):
            threading.Thread(target=work, name="jacobiflow-watch", daemon=True).start()

    def stop(self) -> None:
        """Stops the threads."""
        with self._lock:  # After it, the main thread is not interrupted any more.
            self._stopped.set()
        self._answers.put(None)

    def raise_failure(self, error: BaseException) -> None:
        """Raises the failure of another process that caused `error`, or else tells the others of `error`."""
        if isinstance(error, ProcessFailed):
            return
        with suppress(KeyboardInterrupt):  # The watch may have interrupted this thread just now.
            self.stop()
            time.sleep(0.01)
        is_lost = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
        failure = self._failure or self._announce(_ended("a process") if is_lost else _message(error))
        if not failure.is_reported:
            time.sleep(4 * _BEAT)  # The others read the message before this process ends, which may keep the store.
        if is_lost or failure.is_reported or failure is self._failure:
            raise failure from error

    def _ask(self) -> None:
        while not self._stopped.wait(_BEAT):
            self._answers.put(self._find_failure())

    def _watch(self) -> None:
        failure = None
        while failure is None:
            try:
                failure = self._answers.get(timeout=_SILENCE)
            except queue.Empty:
                failure = self._lose_store()
            if self._stopped.is_set():
                return
        self._failure = failure
        with self._lock:
            if self._stopped.is_set():
                return
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        if not self._stopped.wait(_GRACE):  # The main thread may wait for a process that is gone.
            if not failure.is_reported:
                print(f"error: {failure}", file=sys.stderr, flush=True)
            os._exit(2)

    def _find_failure(self) -> ProcessFailed | None:
        """Gives a sign of life, and returns the failure of another process, if any."""
        try:
            self._store.add(f"beat {self._rank}", 1)
            if first := self._store.compare_set(_FAILURE, "", "").decode():
                return self._parse(first)
        except RuntimeError:
            return None if self._stopped.wait(4 * _BEAT) else self._announce("")
        silent = next(filter(self._is_silent, self._watched), None)
        return None if silent is None else self._announce(_ended(f"process {silent} of {self._count}"))

    def _announce(self, message: str) -> ProcessFailed:
        """Stores a failure, and returns the first one that any process stored."""
        try:
            return self._parse(self._store.compare_set(_FAILURE, "", f"{self._rank} {message}").decode())
        except RuntimeError:
            return self._lose_store()

    def _lose_store(self) -> ProcessFailed:
        """Returns the failure of the first process, which keeps the store; the second one prints it."""
        return ProcessFailed(_ended(f"process 0 of {self._count}"), is_reported=self._rank > 1)

    def _parse(self, failure: str) -> ProcessFailed:
        rank, _, message = failure.partition(" ")
        return ProcessFailed(message, is_reported=int(rank) != self._rank)

    def _is_silent(self, rank: int) -> bool:
        beat, now = self._store.add(f"beat {rank}", 0), time.monotonic()
        if self._beats.get(rank, (-1, 0.0))[0] != beat:
            self._beats[rank] = beat, now
        return now - self._beats[rank][1] > _SILENCE


def _ended(process: str) -> str:
    return (
        f"{process} ended without a message, or hangs: it may have been killed, or its machine may be out of memory; "
        "run the same command again, which resumes"
    )


def _message(error: BaseException) -> str:
    return str(error) or type(error).__name__
