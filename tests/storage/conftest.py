"""One thread, and undisturbed runs to compare with."""

from __future__ import annotations

from pathlib import Path

import pytest
import sample_folders


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """The same rounding, and the same machine in every manifest."""


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs without a flow, by the kind of their files."""
    folder = tmp_path_factory.mktemp("reference")
    return {files: sample_folders.run(folder / files, files=files).path for files in ("npz", "png")}
