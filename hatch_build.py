"""Puts the native library, compiled for each kind of processor, into wheels."""

from __future__ import annotations

import platform
import runpy
import subprocess
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeLibraryHook(BuildHookInterface[Any]):
    """Compiles the library for a wheel. Without a compiler, or in an editable install, the first use compiles it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Adds the compiled files to the wheel, which then installs on this system only."""
        if version == "editable" or platform.system() not in ("Linux", "Darwin"):
            return
        compiler = runpy.run_path(str(Path(self.root, "src/jacobiflow/native/compiler.py")))
        self.folder = TemporaryDirectory()  # exists until the wheel is written
        try:
            paths = compiler["compile_targets"](Path(self.folder.name))
        except (OSError, subprocess.SubprocessError) as error:
            reason = getattr(error, "stderr", None) or error
            self.app.display_warning(f"no native library in the wheel, since it could not be compiled: {reason}")
            return
        build_data["force_include"].update({str(path): f"jacobiflow/native/lib/{path.name}" for path in paths})
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
