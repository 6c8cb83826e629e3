"""Files of npm packages, for pages that load nothing from another host."""

from __future__ import annotations

import base64
import hashlib
import io
import tarfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from benchmarks import ROOT
from jacobiflow.utils.files import write_atomically


def npm_files(name: str, version: str, sha512: str, files: Sequence[str]) -> list[Path]:
    """Files of a package's folder `dist`, fetched from the npm registry once and stored in build/web.

    Raises:
        OSError: If the registry cannot be reached.
        RuntimeError: If it sends a package with another SHA-512.
    """
    paths = [ROOT / "build" / "web" / f"{name}@{version}" / file for file in files]
    if all(path.is_file() for path in paths):
        return paths
    address = f"https://registry.npmjs.org/{name}/-/{name}-{version}.tgz"
    with urllib.request.urlopen(address, timeout=60) as response:
        package = response.read()
    digest = base64.b64encode(hashlib.sha512(package).digest()).decode()
    if digest != sha512:
        raise RuntimeError(f"{address}: the registry sent another package (SHA-512 {digest})")
    with tarfile.open(fileobj=io.BytesIO(package)) as members:
        for path in paths:
            content = members.extractfile(f"package/dist/{path.name}")
            assert content is not None  # it is a file
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content.read())
    return paths
