"""One owner of a folder at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from jacobiflow.locking import FolderInUseError, locked


@pytest.mark.parametrize("next_one", [True, False])
def test_a_lock_on_a_file_that_its_last_owner_has_removed_keeps_nobody_out(
    next_one: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last owner removes the file after this process has opened it; the next owner may make another one."""
    acquire, file = FileLock.acquire, tmp_path / ".lock"

    def late(self: FileLock, *given: Any, **options: Any) -> Any:
        monkeypatch.undo()
        result = acquire(self, *given, **options)
        file.unlink()
        if next_one:
            file.touch()
        return result

    monkeypatch.setattr(FileLock, "acquire", late)
    with pytest.raises(FolderInUseError, match="another run is writing to it"), locked(tmp_path):
        pass
    assert os.listdir(tmp_path) == [".lock"] * next_one
    with locked(tmp_path):
        pass
