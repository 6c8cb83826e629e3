"""One process at a time in a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from jacobiflow.errors import InputValueError

LOCK = ".lock"


class FolderInUseError(InputValueError):
    """A folder that another process is writing to."""


@contextmanager
def locking(path: Path) -> Iterator[Callable[[], None]]:
    """A lock on the folder `path`, released at the end, and by the system where the process is killed.

    **Yields** a function that makes the folder and locks it, to be called in one process only. It **raises**
    `FolderInUseError`, a `ValueError`, where another process holds the lock; `ValueError` where the file of the lock is
    not ours; `OSError` where there can be no such folder. Where an error leaves the folder as it was but for the lock,
    the lock is removed, and with it the folders that were made for it.

    Only its owner removes the file of a lock, once it has done all else; whoever has opened it before is refused.
    """
    lock = FileLock(path / LOCK)
    new: list[Path] = []
    before: set[str] = set()

    def acquire() -> None:
        try:
            new.extend(place for place in (path, *path.parents) if not place.exists())
            path.mkdir(parents=True, exist_ok=True)
            before.update(entry.name for entry in path.iterdir())
            _check(path / LOCK)
            with open(path / LOCK, "ab") as file:  # which keeps its inode from another file
                lock.acquire(timeout=0)
                if not _is_at(file.fileno(), path / LOCK):  # its last owner removed it: a lock on it keeps nobody out
                    lock.release()
                    raise Timeout(lock.lock_file)
        except Timeout as error:
            raise FolderInUseError(
                f"{path}: another run is writing to it; wait for it, stop it, or give another folder"
            ) from error
        except OSError as error:
            raise OSError(f"{path}: cannot be used as a folder ({error.strerror}); give another folder") from error

    try:
        yield acquire
    except BaseException:
        with suppress(OSError):
            if lock.is_locked and {entry.name for entry in path.iterdir()} - before == {LOCK}:
                (path / LOCK).unlink(missing_ok=True)
            for place in new:
                place.rmdir()  # unless it holds something
        raise
    finally:
        lock.release()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """As `locking`, for one process: the folder is made and locked at once."""
    with locking(path) as acquire:
        acquire()
        yield


def in_use(path: Path) -> bool:
    """Whether a process is writing to the folder `path`, which is not changed."""
    try:
        _check(path / LOCK)
        if (path / LOCK).is_file():
            FileLock(path / LOCK).acquire(timeout=0).lock.release()
    except Timeout:
        return True
    except (OSError, ValueError):
        pass
    return False


def _is_at(opened: int, path: Path) -> bool:
    """True if an open file is the one at `path`."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(opened), os.stat(path))
    return False


def _check(file: Path) -> None:
    """**Raises** `ValueError` for a file that is no lock of ours: these are empty."""
    if file.is_symlink() or (file.exists() and not (file.is_file() and file.stat().st_size == 0)):
        raise InputValueError(f"{file}: is not a lock of jacobiflow; move it away, or give another folder")
