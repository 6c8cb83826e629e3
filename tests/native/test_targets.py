"""Malformed calls of native code, which is also compiled for other processors, and with sanitizers."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest

import jacobiflow as jf
from jacobiflow.native import compiler, library, weights
from jacobiflow.native.library import Library
from tests.helpers.native_problems import CASES, relative_error, threads
from tests.native import fuzz
from tests.native.sanitizers import SANITIZERS

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
TARGETS = compiler.TARGETS.get(platform.machine(), {})


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The libraries of a wheel, without optimization."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "FLAGS", (*compiler.FLAGS, "-O0"))
        return dict(zip(TARGETS, compiler.compile_targets(tmp_path_factory.mktemp("targets")), strict=True))


def call(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes malformed calls. Each is refused, or gives what PyTorch gives, in gradients too."""
    monkeypatch.setattr(weights, "MIN_IN_PLACE", weights.MIN_IN_PLACE)  # calls change it
    with threads(3):
        for seed in range(count):
            fuzz.run(seed)


def test_malformed_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    call(40, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_the_targets_of_a_wheel_give_the_same(
    name: str, targets: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not set(TARGETS[name]) <= set(CPU):
        pytest.skip("the processor has no such vectors")
    loaded = Library(targets[name])
    assert loaded.lanes == {"avx512": 16, "avx2": 8}.get(name, 4)
    monkeypatch.setattr(library, "_load_or_explain", lambda: (loaded, ""))
    for case in CASES.values():
        flow = case.flow()
        with threads(case.threads):
            x, _ = case.block(flow).sequential_inverse(case.z(flow), jf.Context(case.context()))
        assert relative_error(x, case.answer(flow, case.z(flow))) < 3e-6, case
    call(200, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("memory and undefined behaviour", 110), ("data races", 30)])
def test_malformed_calls_under_a_sanitizer_of(name: str, count: int) -> None:
    sanitizer = SANITIZERS[name]
    if not sanitizer.paths():
        pytest.skip("the compiler has no such sanitizer")
    result = sanitizer.fuzz(0, count, subprocess.PIPE)
    assert result.returncode == 0, result.stdout
