"""One process at a time in a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"


class FolderInUseError(ValueError):
    """A folder that another process is writing to."""


@contextmanager
def locking(path: Path) -> Iterator[Callable[[], None]]:
    """A lock on the folder `path`, released at the end, and by the system where the process is killed.

    **Yields** a function that makes the folder and locks it, to be called in one process only. It **raises**
    `FolderInUseError`, a `ValueError`, where another process holds the lock. Where an error leaves the folder as it was
    but for the lock, the lock is removed, and with it the folders that were made for it.
    """
    new = [place for place in (path, *path.parents) if not place.exists()]
    lock = FileLock(path / LOCK)
    before: set[str] = set()

    def acquire() -> None:
        path.mkdir(parents=True, exist_ok=True)
        before.update(entry.name for entry in path.iterdir())
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise FolderInUseError(
                f"{path}: another run is writing to it; wait for it, stop it, or give another folder"
            ) from error

    try:
        yield acquire
    except BaseException:
        if lock.is_locked and {entry.name for entry in path.iterdir()} - before == {LOCK}:
            (path / LOCK).unlink(missing_ok=True)
            with suppress(OSError):  # another process has written into a parent meanwhile
                for place in new:
                    place.rmdir()
        raise
    finally:
        lock.release()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """As `locking`, for one process: the folder is made and locked at once."""
    with locking(path) as acquire:
        acquire()
        yield
