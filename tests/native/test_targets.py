"""The same recurrences compiled for other processors, and with the sanitizers."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from jacobiflow import native
from jacobiflow.native import build, compiler
from jacobiflow.native.boundary import Library
from tests.helpers.library_flows import CASES as FLOWS
from tests.helpers.library_flows import NATIVE, check
from tests.helpers.native_problems import CASES, relative_error, threads

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
TARGETS = compiler.TARGETS.get(platform.machine(), {})


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what is compiled for a wheel."""
    if native.library() is None:
        pytest.skip(native.describe())
    folder = tmp_path_factory.mktemp("targets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "FLAGS", (*compiler.FLAGS, "-O0"))  # is compiled sooner
        paths = compiler.compile_targets(folder)
    for name, path in zip(TARGETS, paths, strict=True):
        path.rename(folder / name)
    return folder


@pytest.mark.parametrize("name", TARGETS)
def test_the_targets_of_a_wheel_give_the_same(name: str, targets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not set(TARGETS[name]) <= set(CPU):
        pytest.skip("the processor has no such vectors")
    loaded = Library(targets / name)
    assert loaded.lanes == {"avx512": 16, "avx2": 8}.get(name, 4)
    monkeypatch.setattr(build, "_loaded", lambda: (loaded, ""))
    for case in CASES.values():
        flow = case.flow()
        with threads(case.threads):
            x, _ = case.block(flow).exact_inverse(case.z(flow), case.context())
        assert relative_error(x, case.answer(flow, case.z(flow))) < 3e-6, case
    for dtype in (torch.float32, torch.float64):
        x, context = torch.randn(70, 6, dtype=dtype), torch.randn(70, 2, dtype=dtype)
        for small in NATIVE:
            check(FLOWS[small].make(2, 6, dtype), x, context, threads=2)


@dataclass(frozen=True)
class Sanitizer:
    """A sanitizer of the compiler: its flags, its own libraries, its settings, and how it is tried."""

    flags: str
    runtimes: tuple[str, ...]
    settings: dict[str, str]
    options: tuple[str, ...]


MEMORY = f"malloc_fill_byte=255:max_malloc_fill_size={2**30}"  # memory is NaN until it is written
SANITIZERS = {
    "out of bounds or undefined": Sanitizer(
        "-fsanitize=address,undefined -fno-sanitize-recover=all", ("asan", "ubsan"),
        {"ASAN_OPTIONS": f"detect_leaks=0:allocator_may_return_null=1:{MEMORY}"}, ("--count", "150"),
    ),
    "a data race": Sanitizer(
        "-fsanitize=thread", ("tsan",), {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1"},
        ("--count", "45", "--callers", "3"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", SANITIZERS)
def test_no_call_is(fault: str, tmp_path: Path) -> None:
    """Malformed and extreme calls, see fuzz.py; `make fuzz` makes more of them."""
    sanitizer = SANITIZERS[fault]
    runtimes = [_printed(os.environ.get("CXX", "c++"), f"-print-file-name=lib{name}.so") for name in sanitizer.runtimes]
    if native.library() is None:
        pytest.skip(native.describe())
    if platform.system() != "Linux" or not all(map(os.path.isabs, runtimes)):
        pytest.skip("the compiler has no sanitizers")
    path = tmp_path / "recurrences.so"
    compiler.compile_library(path, ("-march=native", "-O0", "-g1", *sanitizer.flags.split()))
    result = subprocess.run(
        [sys.executable, "-m", "tests.native.fuzz", path, *sanitizer.options],
        env={**os.environ, **sanitizer.settings, "LD_PRELOAD": " ".join(runtimes),
             "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr


def _printed(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
