"""Fuzzes the native library under the sanitizers of the compiler: `make fuzz`, or `make fuzz SEED=7 COUNT=1`."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from jacobiflow.native import compiler


@dataclass(frozen=True)
class Sanitizer:
    """Flags of the compiler, the libraries that they need, settings, and the number of threads that call at once."""

    flags: tuple[str, ...]
    libraries: tuple[str, ...]
    settings: dict[str, str]
    callers: int

    def paths(self) -> list[str]:
        """The paths of the libraries; empty if the compiler lacks one."""
        command = os.environ.get("CXX", "c++")
        names = [f"-print-file-name=lib{name}.so" for name in self.libraries]
        paths = [subprocess.run([command, name], capture_output=True, text=True).stdout.strip() for name in names]
        return paths if platform.system() == "Linux" and all(map(os.path.isabs, paths)) else []

    def fuzz(self, seed: int, count: int, output: int | None = None) -> subprocess.CompletedProcess[str]:
        """Makes calls in a process of its own; its exit status is not 0 if the sanitizer found something."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "library.so")
            compiler.compile_library(path, ("-march=native", "-O0", "-g1", *self.flags))
            options = (f"--seed={seed}", f"--count={count}", f"--callers={self.callers}")
            return subprocess.run(
                [sys.executable, "-m", "tests.native.fuzz", path, *options],
                env=os.environ | self.settings | {"LD_PRELOAD": " ".join(self.paths())},
                stdout=output, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip


_NAN_UNTIL_WRITTEN = f"malloc_fill_byte=255:max_malloc_fill_size={2**30}"
SANITIZERS = {
    "memory and undefined behaviour": Sanitizer(
        ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        ("asan", "ubsan"),
        {"ASAN_OPTIONS": f"detect_leaks=0:allocator_may_return_null=1:{_NAN_UNTIL_WRITTEN}"},
        callers=1,
    ),
    "data races": Sanitizer(
        ("-fsanitize=thread",), ("tsan",), {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1"}, callers=3
    ),
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=5000)
    options = parser.parse_args()
    for name, sanitizer in SANITIZERS.items():
        print(f"{name}:", flush=True)
        if sanitizer.fuzz(options.seed, options.count).returncode:
            sys.exit(f"the fault above is one of {name}")
