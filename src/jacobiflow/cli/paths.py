"""The paths of a command line, checked together before any work: no output is an input, and all can be written."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NoReturn

from jacobiflow.cli.options import LABEL_FILES
from jacobiflow.data.sources import SOURCE_FOLDERS
from jacobiflow.errors import InputValueError
from jacobiflow.flows.folder import CONFIG, MODELS, REPORT, WEIGHTS, bundled, is_report, reports_in
from jacobiflow.locking import LOCK
from jacobiflow.plots import check_page
from jacobiflow.storage.names import IMAGES, MANIFEST, SHARDS, STRATEGY

_ARGUMENTS = ("file", "path")  # inputs that are no options
_PARTIAL = ".{}.0123456789abcdef.partial"  # as long as the name that a file has while it is written


@dataclass(frozen=True)
class _Place:
    """A file or folder that `option` names: as it was given, and with all links resolved."""

    option: str
    given: Path
    path: Path

    @classmethod
    def of(cls, option: str, given: str | Path) -> _Place:
        """**Raises** `ValueError` for a loop of links, a name that is too long, and what is no path at all."""
        try:
            with suppress(FileNotFoundError, NotADirectoryError):
                os.stat(given)
            return cls(option, Path(given), Path(os.path.realpath(given)))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputValueError(f"{option} {given}: cannot be used ({reason}); give another path") from error

    def __str__(self) -> str:
        return f"{self.option} {self.given}"

    def is_same(self, other: _Place) -> bool:
        """Whether both are one place; links to one file have two names for it."""
        with suppress(OSError):
            return self.path == other.path or os.path.samefile(self.path, other.path)
        return False

    def is_in(self, other: _Place) -> bool:
        """Whether this is below `other`."""
        return other.path in self.path.parents

    def refuse(self, why: str) -> NoReturn:
        """**Raises** `ValueError`: this output cannot be taken."""
        raise InputValueError(f"{self}: {why}")


def check(
    json: Path | None,
    out: Path | None = None,
    writes: Sequence[str] = (),
    out_file: Path | None = None,
    save_stats: Path | None = None,
    html: Path | None = None,
    calibrates: bool = False,
    **inputs: Any,
) -> None:
    """Check all paths of a command before long work starts, and leave nothing behind.

    **Arguments:**

    - `json`, `out_file` (an `--out` that is a file), `save_stats` and `html`: files that the command writes.
    - `out`, `writes`: a folder that it writes, and what in it; a name without a suffix is a folder, and a name may have
      a wildcard.
    - `calibrates`: whether `out_file` may be a report in the model's folder.
    - `inputs`: what the command reads, by the option's name: `model`, `samples`, `images` (a name, or a folder),
      `labels` (text, or a file), `strategy` (names and files), and any other file or folder.

    **Raises** `ValueError` for an output that is an input too, or lies in a folder of images that is read; for two
    outputs in one place; where nothing can be written; and where `html` is there, but is no page of ours.
    """
    named = (("--out", out_file), ("--save-stats", save_stats), ("--json", json), ("--html", html))
    files = [_Place.of(option, path) for option, path in named if path is not None]
    folder = None if out is None else _Place.of("--out", out)
    reads = [place for name, value in inputs.items() for place in _inputs(name, value)]
    model = _Place.of("--model", _model_folder(inputs["model"])).path if calibrates else None
    outputs = [*files, *([] if folder is None else _check_folder(folder, writes, files, reads))]
    for i, file in enumerate(files):
        _check_distinct(file, files[:i])
        _check_file(file)
        own = file.option == "--out" and file.path.parent == model and is_report(file.path.name)
        _check_not_read(file, [place for place in reads if not own or place.path != file.path])
        if not own:
            _check_not_bundled(file)
    _check_not_linked(outputs, reads)
    if html is not None:
        check_page(html)


@contextmanager
def making(folder: Path) -> Iterator[None]:
    """Make `folder` for what is written in the block; where an error leaves folders empty that are new, remove them."""
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # one is not empty
            for place in new:
                place.rmdir()
        raise


def _check_distinct(file: _Place, others: Sequence[_Place]) -> None:
    for other in others:
        if file.is_same(other):
            file.refuse(f"is {other.option} too; give two files")
        if file.is_in(other) or other.is_in(file):
            file.refuse(f"is below {other}, or above it; give another file")


def _check_file(file: _Place) -> None:
    if file.path.is_dir():
        file.refuse("is a folder; give a file")
    if file.option in ("--json", "--html") and not file.given.parent.is_dir():  # whose folder is not made
        file.refuse("give a file in a folder that exists")
    folder, name = Path(os.path.realpath(file.given.parent)), file.given.name
    _check_writable(file, folder, (name, _PARTIAL.format(name)))


def _check_folder(
    folder: _Place, writes: Sequence[str], files: Sequence[_Place], reads: Sequence[_Place]
) -> list[_Place]:
    """The files and folders that the command writes into `folder`: those that have a name, and those that are there."""
    outputs = []
    _check_writable(folder, folder.path)
    _check_not_bundled(folder)
    for place in reads:
        if place.path.is_dir() and (folder.is_same(place) or folder.is_in(place)):
            folder.refuse(f"is in {place}, which this command reads; give another folder")
    for file in files:
        if folder.is_same(file) or folder.is_in(file):
            file.refuse("is the folder --out, or above it; give another file")
        if file.is_in(folder) and any(_matches(file.path.relative_to(folder.path).parts[0], w) for w in writes):
            file.refuse(f"is one of the files that this command writes into {folder}; give another")
    there = os.listdir(folder.path) if folder.path.is_dir() else []
    for name in dict.fromkeys([*(w for w in writes if "*" not in w), *there]):
        if not any(_matches(name, pattern) for pattern in writes):
            continue
        written = _Place("--out", folder.given / name, Path(os.path.realpath(folder.path / name)))
        if written.path.is_dir() and written.given.suffix:
            written.refuse("is a folder, where this command writes a file; move it away, or give another --out")
        _check_not_read(written, reads)
        for file in files:
            if file.is_same(written) or file.is_in(written):
                file.refuse(f"is {written}, which this command writes; give another")
        outputs.append(written)
    return outputs


def _matches(name: str, pattern: str) -> bool:
    return name == LOCK or fnmatch(name, pattern)


def _check_writable(output: _Place, folder: Path, names: Sequence[str] = ()) -> None:
    """**Raises** `ValueError` where `folder` cannot be made, or no files of these names in it."""
    missing = [place.name for place in (folder, *folder.parents) if not place.exists()]
    nearest = (folder, *folder.parents)[len(missing)]
    try:
        for name in (*missing, *names):
            with suppress(FileNotFoundError):
                os.stat(nearest / name)  # it may be too long
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        output.refuse(f"cannot write there ({error.strerror}); give another {'file' if names else 'folder'}")


def _check_not_bundled(output: _Place) -> None:
    if Path(os.path.realpath(str(MODELS))) in (output.path, *output.path.parents):
        output.refuse("lies with the bundled models; give another place")


def _check_not_read(output: _Place, reads: Sequence[_Place]) -> None:
    """**Raises** `ValueError` if `output` is one of the places that are read, lies in one, or holds one."""
    there = os.path.lexists(output.path)
    for place in reads:
        if output.is_same(place) or place.is_in(output):
            output.refuse(f"is {place}, which this command reads; give another")
        if there and output.is_in(place):
            output.refuse(f"is in {place}, which this command reads; give another")


def _check_not_linked(outputs: Sequence[_Place], reads: Sequence[_Place]) -> None:
    """**Raises** `ValueError` if an output is below a folder that is read, by another name. Links are followed.

    A folder may hold a million images: each is looked at once, for all outputs together.
    """
    wanted: dict[tuple[int, int], _Place] = {}
    for output in outputs:
        with suppress(OSError):  # it is not there
            wanted[_inode(os.stat(output.path))] = output
    for place in reads if wanted else ():
        for inode in _inodes(place.path) if place.path.is_dir() else ():
            if inode in wanted:
                wanted[inode].refuse(f"is in {place}, which this command reads; give another")


def _inodes(folder: Path) -> Iterator[tuple[int, int]]:
    """The files and folders below `folder`, links followed."""
    seen, waiting = set(), [folder]
    while waiting:
        parent = waiting.pop()
        for name in os.listdir(parent):
            with suppress(OSError):  # a broken link, a folder that may not be read
                status = os.stat(parent / name)
                yield (inode := _inode(status))
                if stat.S_ISDIR(status.st_mode) and os.access(parent / name, os.R_OK) and inode not in seen:
                    seen.add(inode)
                    waiting.append(parent / name)


def _inode(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _inputs(name: str, value: Any) -> list[_Place]:
    """The files and folders that an option's value stands for; none for a bundled data set or a strategy's name."""
    option = name.upper() if name in _ARGUMENTS else f"--{name}"
    if name == "images":
        value = SOURCE_FOLDERS.get(value, value)
    values: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    if name == "model":
        folder = _model_folder(value)
        values = [folder / CONFIG, folder / WEIGHTS, folder / REPORT, *reports_in(folder)]
    elif name == "samples":
        values = [folder / part for folder in values for part in (MANIFEST, STRATEGY, SHARDS, IMAGES)]
    elif name == "images":
        values = [folder for folder in values if os.path.isdir(folder)]
    elif name in ("labels", "strategy"):
        values = [text for text in values if text.endswith((*LABEL_FILES, ".json"))]
    return [_Place.of(option, value) for value in values]


def _model_folder(name: str) -> Path:
    return bundled().get(name, Path(name))
