"""Native code compiled for other processors, and with sanitizers."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest
import torch

import jacobiflow as jf
from jacobiflow import native
from jacobiflow.native import compiler, library
from jacobiflow.native.library import Library
from tests.helpers.library_flows import CASES as FLOWS
from tests.helpers.library_flows import NATIVE, check, default_dtype, gradient_gap, gradients, normal
from tests.helpers.native_problems import CASES, relative_error, threads
from tests.native.sanitizers import SANITIZERS

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
TARGETS = compiler.TARGETS.get(platform.machine(), {})


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what is compiled for a wheel."""
    if native.load_library() is None:
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
    monkeypatch.setattr(library, "_load_or_explain", lambda: (loaded, ""))
    for case in CASES.values():
        flow = case.flow()
        with threads(case.threads):
            x, _ = case.block(flow).sequential_inverse(case.z(flow), jf.Context(case.context()))
        assert relative_error(x, case.answer(flow, case.z(flow))) < 3e-6, case
    for dtype in (torch.float32, torch.float64):
        x, context = normal(70, 6, dtype=dtype), normal(70, 2, seed=1, dtype=dtype)
        x.requires_grad_(), context.requires_grad_()
        cotangents = [normal(70, 6, seed=2, dtype=dtype), normal(70, seed=3, dtype=dtype)]
        for small in NATIVE:
            flow = FLOWS[small].make(2, 6, dtype)
            check(flow, x, context, threads=2)
            for is_inverse in (False, True):
                with default_dtype(dtype):
                    expected = gradients(flow, x, context, is_inverse, cotangents)
                    with jf.accelerate(flow), threads(2):
                        result = gradients(flow, x, context, is_inverse, cotangents)
                assert gradient_gap(expected, result) < (1e-9 if dtype == torch.float64 else 1e-2), small


@pytest.mark.parametrize(("name", "count"), [("memory and undefined behaviour", 110), ("data races", 30)])
def test_malformed_calls_under_a_sanitizer_of(name: str, count: int) -> None:
    """Each call is refused, or gives what PyTorch gives; `make fuzz` makes more of them."""
    sanitizer = SANITIZERS[name]
    if native.load_library() is None:
        pytest.skip(native.describe())
    if not sanitizer.paths():
        pytest.skip("the compiler has no such sanitizer")
    result = sanitizer.fuzz(0, count, subprocess.PIPE)
    assert result.returncode == 0, result.stdout
