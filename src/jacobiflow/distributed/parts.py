"""Parts of a job that share a folder without communication, such as the jobs of a SLURM array."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from jacobiflow.errors import InputValueError
from jacobiflow.utils.files import LOCK, FolderInUseError, locked

T = TypeVar("T")

_MAX_START_SECONDS = 1800  # Longest wait for a part that starts the job: it may plan a strategy for a large model.


@dataclass(frozen=True)
class Part:
    """One of several jobs that share work without communication, such as those of a SLURM array.

    Args:
        index: Number of this part, from 1.
        count: Number of parts.

    Example:
        >>> jf.Part(2, 3).share(range(8))
        range(1, 8, 3)
    """

    index: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise InputValueError(f"part={self}: give I/N with I from 1 to N, such as 1/8 for the first of eight")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str | None) -> Part:
        """Parses "I/N"; None is the only part."""
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", "1/1" if text is None else text)
        if match is None:
            raise InputValueError(f"part={str(text)[:40]}: give I/N, such as 1/8 for the first of eight parts")
        return cls(int(match[1]), int(match[2]))

    def share(self, units: Sequence[T]) -> Sequence[T]:
        """Returns every N-th unit, from number I on."""
        return units[self.index - 1 :: self.count]

    @property
    def lock_name(self) -> str:
        """The file in a folder that this part locks while it runs."""
        return f"{LOCK}-{self.index}-of-{self.count}"


@contextmanager
def start_part(folder: Path, part: Part, locks: ExitStack) -> Iterator[bool]:
    """Locks a folder while a part starts, and the part until `locks` is closed; yields whether other parts run.

    Raises:
        FolderInUseError: If the part runs already, or if the folder is in use by a job with another number of parts.
    """
    with locked(folder, wait=_MAX_START_SECONDS if part.count > 1 else 0):
        others = [other for other in find_parts(folder) if other != part and _is_running(folder, other)]
        for other in others:
            if other.count != part.count:
                user = "another run" if other.count == 1 else f"part {other} of another run"
                raise FolderInUseError(
                    f"{folder}: {user} is writing to it; wait for it, stop it, or give another folder"
                )
        user = "another run" if part.count == 1 else f"another run of part {part}"
        locks.enter_context(locked(folder, part.lock_name, user=user))
        try:
            yield bool(others)
        except BaseException:  # The part has not started, so it leaves no file.
            with suppress(OSError):
                (folder / part.lock_name).unlink()
            raise


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Locks a folder against other parts that start or finish."""
    with locked(folder, wait=_MAX_START_SECONDS):
        yield


def find_parts(folder: Path) -> list[Part]:
    """Returns the parts that have started in a folder whose job is not complete."""
    names = (re.fullmatch(rf"{re.escape(LOCK)}-(\d+)-of-(\d+)", file.name) for file in folder.glob(f"{LOCK}-*"))
    return sorted((Part(int(name[1]), int(name[2])) for name in names if name), key=lambda part: part.index)


def forget_parts(folder: Path) -> None:
    """Removes the lock files of all parts after the job is complete."""
    for part in find_parts(folder):
        with suppress(OSError):  # Windows cannot remove the file of a part that is ending.
            (folder / part.lock_name).unlink()


def _is_running(folder: Path, part: Part) -> bool:
    try:
        with locked(folder, part.lock_name):
            return False
    except FolderInUseError:
        return True
