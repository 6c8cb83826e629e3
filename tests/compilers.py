"""Compilers for the tests of native code."""

from __future__ import annotations

import shlex
from pathlib import Path


def copying_compiler(path: Path, library: Path, before: str = "") -> Path:
    """Writes a compiler to `path` that runs the shell command `before`, then gives the same library each time."""
    path.write_text(f"""#!/bin/sh
while [ "$1" != -o ]; do shift; done
{before}
cp {shlex.quote(str(library))} "$2"
""")
    path.chmod(0o755)
    return path
