"""The site, built once for all workers."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    from tools.docs import website

    shared = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        shared = shared.parent  # the folder of all workers
    with FileLock(shared / "site.lock"):
        address = shared / "site.txt"  # written once the site is complete
        if not address.exists():
            address.write_text(str(website.build(shared / "site")))
        return Path(address.read_text())
