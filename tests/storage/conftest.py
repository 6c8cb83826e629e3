"""Undisturbed runs to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sample_folders
import torch


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """The same rounding, and the same machine in every manifest."""


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Runs without a flow, by the kind of their files."""
    folder = tmp_path_factory.mktemp("reference")
    for files in ("npz", "png"):
        sample_folders.run(folder / files, files=files)
    yield {files: folder / files for files in ("npz", "png")}


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of a flow."""
    folder, threads = tmp_path_factory.mktemp("drawn"), torch.get_num_threads()
    torch.set_num_threads(1)
    sample_folders.draw(folder)
    torch.set_num_threads(threads)
    return folder
