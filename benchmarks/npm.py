"""Files of npm packages, for pages that load nothing from another host."""

from __future__ import annotations

import base64
import hashlib
import io
import tarfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from jacobiflow.files import write_atomically

KEPT = Path(__file__).resolve().parent.parent / "build" / "web"


def npm_files(name: str, version: str, sha512: str, files: Sequence[str]) -> list[Path]:
    """Files of a package's folder `dist`, fetched from the npm registry once and kept in build/web.

    **Raises** `RuntimeError` where the registry cannot be reached, or sends a package with another SHA-512.
    """
    kept = [KEPT / f"{name}@{version}" / file for file in files]
    if all(path.is_file() for path in kept):
        return kept
    address = f"https://registry.npmjs.org/{name}/-/{name}-{version}.tgz"
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            package = answer.read()
    except OSError as error:
        raise RuntimeError(f"{address}: {error}; the first build needs the npm registry") from error
    found = base64.b64encode(hashlib.sha512(package).digest()).decode()
    if found != sha512:
        raise RuntimeError(f"{address}: the registry sent another package (SHA-512 {found})")
    with tarfile.open(fileobj=io.BytesIO(package)) as members:
        for path in kept:
            content = members.extractfile(f"package/dist/{path.name}")
            assert content is not None  # it is a file
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content.read())
    return kept
