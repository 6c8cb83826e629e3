"""Settings that all tests share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
import torch
from filelock import FileLock

from jacobiflow import native


@pytest.fixture(autouse=True, scope="session")
def _cache_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is kept between runs goes to a folder of the tests: plans to one of each process, which compile once."""
    home = tmp_path_factory.mktemp("cache")
    own = home / "jacobiflow" / "native"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        if "PYTEST_XDIST_WORKER" in os.environ:
            shared = tmp_path_factory.getbasetemp().parent / "native"
            with FileLock(f"{shared}.lock"):
                if shared.exists():
                    shutil.copytree(shared, own)
                native.load_library()  # unless a module has asked for it already
                if own.exists() and not shared.exists():
                    shutil.copytree(own, shared)
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread: faster for the tiny float64 flows, and the same rounding on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
