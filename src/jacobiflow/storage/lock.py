"""One run at a time in a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from jacobiflow.storage.folder import MANIFEST
from jacobiflow.storage.manifest import SampleFolderError

_LOCK = ".lock"


@contextmanager
def locking(path: Path) -> Iterator[Callable[[], None]]:
    """A lock on the folder `path`, released at the end, and by the system where the process is killed.

    **Yields** a function that makes the folder and locks it, to be called in one process only. It **raises**
    `SampleFolderError` where another run holds the lock. Where an error leaves a new folder without a manifest, the
    folder is removed again.
    """
    new = [place for place in (path, *path.parents) if not place.exists()]
    lock = FileLock(path / _LOCK)

    def acquire() -> None:
        path.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise SampleFolderError(
                f"{path}: another run is writing to it; wait for it, stop it, or give another folder"
            ) from error

    try:
        yield acquire
    except BaseException:
        if lock.is_locked and not (path / MANIFEST).exists():
            (path / _LOCK).unlink(missing_ok=True)
            with suppress(OSError):  # a folder is not empty
                for place in new:
                    place.rmdir()
        raise
    finally:
        lock.release()
