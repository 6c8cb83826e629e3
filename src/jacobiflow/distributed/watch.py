"""The end of all processes after one of them has failed."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from jacobiflow.errors import InputValueError

_BEAT = 0.5  # Seconds between two signs of life of a process.
_SILENCE = 15.0  # Seconds without a sign of life after which a process counts as ended.
_GRACE = 5.0  # Seconds in which the main thread must end after another process has failed.
_BEFORE_MESSAGE = 2.0  # Seconds before the process that prints a message ends; it may keep the store that others read.
_AFTER_MESSAGE = 4.0  # Seconds before the others end: torchrun and srun stop all processes once one has ended.
_FAILURE = "failure"  # The key of the first failure in the store.
_INTERRUPT = "KeyboardInterrupt"  # The message of a failure by Ctrl-C.


class ProcessFailed(InputValueError):  # noqa: N818
    """Another process failed, so this one stopped too.

    Attributes:
        is_reported: Whether another process prints the message.
    """

    def __init__(self, message: str, is_reported: bool) -> None:
        super().__init__(message)
        self.is_reported = is_reported


class Watch:
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
        """Raises the failure of another process that caused `error`, or else tells the others of `error`.

        If one process was interrupted, all end by KeyboardInterrupt.
        """
        with suppress(KeyboardInterrupt):  # The watch may have interrupted this thread just now.
            self.stop()
            time.sleep(0.01)
        if isinstance(error, ProcessFailed):
            time.sleep(_AFTER_MESSAGE)
            return
        is_lost = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
        failure = self._failure or self._announce(_ended("a process") if is_lost else message_of(error))
        is_interrupt = str(failure) == _INTERRUPT
        is_silent = self._rank > 0 if is_interrupt else failure.is_reported
        time.sleep(_AFTER_MESSAGE if is_silent else _BEFORE_MESSAGE)
        if is_interrupt:
            raise KeyboardInterrupt from error
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
            silent = next(filter(self._is_silent, self._watched), None)
        except RuntimeError:
            return None if self._stopped.wait(4 * _BEAT) else self._announce("")
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


def message_of(error: BaseException) -> str:
    """Returns the message of an error, or its class if it has none."""
    return str(error) or type(error).__name__
