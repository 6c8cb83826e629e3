"""Exact inverses by native code, against an oracle in float64 and the same loop in PyTorch."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import jacobiflow as jf
from tests.helpers.native_problems import CASES, Case, relative_error, threads
from tests.helpers.running import in_child

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDING = 3e-6  # measured: 4e-7 at most
EXACT = jf.Solver(jf.Sequential())


@pytest.fixture
def nan_where_uninitialised() -> Iterator[None]:
    """`torch.empty` is full of NaN, so that nothing can be computed from what was never written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def eagerly(monkeypatch: pytest.MonkeyPatch, block: Any, z: Tensor, labels: Tensor | None = None) -> jf.Solution:
    with monkeypatch.context() as patch:
        patch.setenv("JACOBIFLOW_NATIVE", "0")
        return jf.solve(block, z, EXACT, labels)


@pytest.mark.usefixtures("nan_where_uninitialised")
@pytest.mark.parametrize("name", CASES)
def test_is_the_inverse(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    flow = case.flow()
    block, z, labels = case.block(flow), case.z(flow), case.context()
    with threads(case.threads), torch.no_grad():
        x, log_det = block.sequential_inverse(z, jf.Context(labels))
        solution = jf.solve(block, z, EXACT, labels)
    assert torch.equal(solution.x, x) and torch.equal(solution.log_det, log_det)
    eager = eagerly(monkeypatch, block, z, labels)
    answer = case.answer(flow, z)
    assert relative_error(x, answer) < ROUNDING
    torch.testing.assert_close(log_det.double(), case.log_det(flow, answer), rtol=1e-5, atol=1e-4)
    assert relative_error(eager.x, answer) < ROUNDING
    assert torch.equal(solution.status, eager.status)
    assert (solution.backend, solution.obstacle) == ("native", None)
    assert (eager.backend, eager.obstacle) == ("sweeps", "native code is off, by JACOBIFLOW_NATIVE=0")
    assert (solution.sweeps, solution.token_evaluations) == (eager.sweeps, eager.token_evaluations)


@pytest.mark.parametrize("name", ["heads of 64, two teams", "MAF, several panels"])
def test_an_overflow_stays_in_its_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    flow = case.flow()
    block, z, labels = case.block(flow), case.z(flow), case.context()
    others = [row for row in range(case.batch) if row != 20]
    with threads(case.threads):
        mild = jf.solve(block, z, EXACT, labels)
        z[20, 2] = 3e38
        solution = jf.solve(block, z, EXACT, labels)
    assert torch.equal(solution.status, eagerly(monkeypatch, block, z, labels).status)
    assert solution.status[20] == jf.Status.NONFINITE and (solution.status[others] == jf.Status.CONVERGED).all()
    assert torch.equal(solution.x[others], mild.x[others])


@pytest.mark.parametrize("name", ["one row", "heads of 17", "STARFlow", "MAF"])
@torch.no_grad()
def test_a_nan_reaches_all_later_tokens(name: str) -> None:
    case = CASES[name]
    flow = case.flow()
    z = case.z(flow)
    clean, _ = case.block(flow).sequential_inverse(z, jf.Context(case.context()))
    z[0, 5] = torch.nan
    x, _ = case.block(flow).sequential_inverse(z, jf.Context(case.context()))
    assert torch.equal(x[0, :5], clean[0, :5]) and x[0, 5:].isnan().all() and torch.equal(x[1:], clean[1:])
    with torch.no_grad():
        flow.blocks[1].get_parameter("layers.0.bias" if case.kind is jf.MAF else "proj_in.bias")[0] = torch.nan
    assert (jf.solve(flow.blocks[1], clean, EXACT).status == jf.Status.NONFINITE).all()


@pytest.mark.parametrize("name", ["heads of 32", "MAF"])
@torch.no_grad()
def test_weights_may_change_and_lie_as_they_like(name: str) -> None:
    case = CASES[name]
    flow = case.flow()
    z = case.z(flow)
    for layout in (z, z.transpose(0, 1).contiguous().transpose(0, 1)):
        x, _ = case.block(flow).sequential_inverse(layout, jf.Context(case.context()))
        assert relative_error(x, case.answer(flow, z)) < ROUNDING
        for i, parameter in enumerate(flow.blocks[1].parameters()):
            parameter.data.mul_(1.1)
            if parameter.ndim == 2 and i % 2:
                parameter.data = parameter.data.T.contiguous().T


@pytest.mark.parametrize("name", ["heads of 64, two teams", "MAF, several panels"])
def test_callers_in_threads_of_their_own(name: str) -> None:
    case = CASES[name]
    flow = case.flow()
    block, z, labels = case.block(flow), case.z(flow), case.context()
    alone, _ = block.sequential_inverse(z, jf.Context(labels))
    with ThreadPoolExecutor(3) as pool:
        for x, _ in pool.map(lambda _: block.sequential_inverse(z, jf.Context(labels)), range(9)):
            assert torch.equal(x, alone)


# Without labels: choosing rows by them is PyTorch's, whose threads a forked process does not have.
@pytest.mark.parametrize("name", ["four teams", "MAF, several panels"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_process_solves_too(name: str) -> None:
    case = CASES[name]
    flow = case.flow()
    block, z = case.block(flow), case.z(flow)

    def child() -> None:
        assert torch.equal(block.sequential_inverse(z)[0], x)

    with threads(case.threads):
        x, _ = block.sequential_inverse(z)
        assert in_child(child) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the memory in use is read from /proc")
@pytest.mark.parametrize("name", ["four teams", "MAF, several panels"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_one_thread_solves_if_no_other_is_available(name: str) -> None:
    case = CASES[name]
    flow = case.flow()
    block, z = case.block(flow), case.z(flow).repeat(100 if "MAF" in name else 7, 1, 1)  # enough for all threads

    def child() -> None:
        torch.set_num_threads(14)
        libc, attributes = ctypes.CDLL(None), ctypes.create_string_buffer(256)
        libc.pthread_attr_init(attributes)
        libc.pthread_attr_setstacksize(attributes, ctypes.c_size_t(2**27))  # glibc has no stack of this size left over
        libc.pthread_setattr_default_np(attributes)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        room = pages * resource.getpagesize() + 2**23
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
        x, _ = block.sequential_inverse(z)
        torch.set_num_threads(1)  # PyTorch itself ends the process if it cannot start a thread.
        torch.testing.assert_close(x, answer, rtol=1e-5, atol=1e-5)

    answer, _ = block.sequential_inverse(z)
    assert in_child(child) == 0


@pytest.mark.parametrize("count", [5, 64])
def test_more_threads_than_there_is_work_for(count: int) -> None:
    for case in (Case({"image_size": 2, "width": 80}, 1), Case({"image_size": 2}, 100), CASES["MAF"]):
        flow = case.flow()
        with threads(count):
            x, _ = case.block(flow).sequential_inverse(case.z(flow), jf.Context(case.context()))
        assert relative_error(x, case.answer(flow, case.z(flow))) < ROUNDING
