"""Mermaid, which draws the diagrams, from the npm registry into the site: a page then loads nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import io
import tarfile
import urllib.request
from pathlib import Path

_PACKAGE = "https://registry.npmjs.org/mermaid/-/mermaid-12.3.0.tgz"
_SHA512 = "4113TdXeLAsMruJ79OpFL5O8+LTFXhQqZ260rF3tgUmiNAtRm4Uume04I+65PRN6yZ69J4f8rVYWW8zRk65UYw=="
_FILE = "package/dist/mermaid.min.js"


def vendor_mermaid(kept: Path) -> Path:
    """The file `kept`, fetched unless it is there. **Raises** `ValueError` where the registry sends something else."""
    if kept.exists():
        return kept
    with urllib.request.urlopen(_PACKAGE, timeout=60) as answer:
        package = answer.read()
    if base64.b64encode(hashlib.sha512(package).digest()).decode() != _SHA512:
        raise ValueError(f"{_PACKAGE} is not the package that was tried: compare its checksum with the registry's")
    with tarfile.open(fileobj=io.BytesIO(package)) as files:
        script = files.extractfile(_FILE)
        assert script is not None  # it is a file
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(".part")
        part.write_bytes(script.read())
        return part.replace(kept)
