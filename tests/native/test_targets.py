"""The same recurrences compiled for other processors, and with the sanitizers."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from native_problems import CASES, relative_error

from jacobiflow import native
from jacobiflow.native import build

HERE = Path(__file__).parent
CPU = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
# -O0, after the library's own -O3, is compiled sooner.
TARGETS = {"128 bits": ("-O0",), "256 bits": ("-O0", "-mavx2", "-mfma")}


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def compiled(path: Path, target: tuple[str, ...]) -> Path:
    if native.library() is None:
        pytest.skip(native.describe())
    native.compile_library(path, target)
    return path


@pytest.mark.parametrize("name", TARGETS)
def test_other_vectors_give_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "256 bits" and not {"avx2", "fma"} <= set(CPU):
        pytest.skip("the processor has no such vectors")
    loaded = SimpleNamespace(library=native.load_library(compiled(tmp_path / "recurrences.so", TARGETS[name])))
    assert 32 * loaded.library.jacobiflow_lanes() == int(name.split()[0])
    monkeypatch.setattr(build, "_loaded", lambda: loaded)
    assert native.library() is loaded.library
    for case in CASES.values():
        flow = case.flow()
        torch.set_num_threads(case.threads)
        x = case.block(flow).exact_inverse(case.z(flow), case.context())
        torch.set_num_threads(1)
        assert relative_error(x, case.answer(flow, case.z(flow))) < 3e-6, case


def test_nothing_is_read_or_written_out_of_bounds(tmp_path: Path) -> None:
    """Nor is anything read before it was written, which is NaN here, nor is there a sum that is not defined."""
    compiler = os.environ.get("CXX", "c++")
    runtimes = [_printed(compiler, f"-print-file-name=lib{name}.so") for name in ("asan", "ubsan")]
    if platform.system() != "Linux" or not all(map(os.path.isabs, runtimes)):
        pytest.skip("the compiler has no sanitizers")
    flags = ("-march=native", "-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    path = compiled(tmp_path / "recurrences.so", flags)
    done = subprocess.run(
        [sys.executable, HERE / "sanitized.py", path],
        env={
            **os.environ,
            "LD_PRELOAD": " ".join(runtimes),
            "ASAN_OPTIONS": f"detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size={2**30}",
            "PYTHONPATH": os.pathsep.join(map(str, (*filter(None, sys.path), HERE.parent))),
        },
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.split("\n")[:-1] == list(CASES), done.stdout + done.stderr


def _printed(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
