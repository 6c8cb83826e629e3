"""Weights of 64, 32 and 16 bits: how they are stored, and what that changes."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch

import jacobiflow as jf
from jacobiflow import native
from jacobiflow.native import transformer, weights
from jacobiflow.native.tensors import WEIGHT_FORMATS
from tests.helpers.native_problems import CASES, Case, relative_error, threads

pytestmark = pytest.mark.usefixtures("one_thread")

HALVES = [torch.bfloat16, torch.float16]
WHOLE_VECTORS = CASES["heads of 32"]
TRANSFORMERS = {name: case for name, case in CASES.items() if case.kind is not jf.MAF}


@pytest.fixture(autouse=True)
def stored(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[torch.dtype, bool]]]:
    """The dtypes of the layers' weights that native code was given, each with whether they were packed."""
    monkeypatch.setattr(weights, "_MIN_BF16", 0)
    monkeypatch.setattr(native.load_library(), "has_fast_halves", True)
    seen, store = set[tuple[torch.dtype, bool]](), transformer.store_weights

    def noted(*arguments: Any) -> Any:
        *stored, proj_in, proj_out = store(*arguments)
        dtypes = {number: dtype for dtype, number in WEIGHT_FORMATS.items()}
        seen.update((dtypes[weight.format], bool(weight.is_packed)) for weight in stored)
        return [*stored, proj_in, proj_out]

    monkeypatch.setattr(transformer, "store_weights", noted)
    yield seen


def rounded(flow: Any, dtype: torch.dtype) -> Any:
    """The flow with weights that the dtype has, in float32; one of them is too small for float16."""
    with torch.no_grad():
        flow.blocks[1].attn_blocks[0].mlp.main[0].weight[0, 0] = 2.0**-30
    return flow.to(dtype).float()


def invert(case: Case, flow: Any, dtype: torch.dtype = torch.float32) -> Any:
    with threads(case.threads):
        return case.block(flow).sequential_inverse(case.z(flow).to(dtype), jf.Context(case.context()))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_weights_of_16_bits_change_no_bit(
    name: str, dtype: torch.dtype, stored: set[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = TRANSFORMERS[name]
    flow = rounded(case.flow(), dtype)
    answer = invert(case, flow)
    rows = case.batch * (1 if case.guide is None else 2)
    if dtype == torch.float16 or rows <= 8:
        assert stored == {(dtype, True)}
    stored.clear()
    monkeypatch.setattr(native.load_library(), "has_fast_halves", False)
    expected = invert(case, flow)
    assert stored == {(torch.float32, True)}
    assert all(map(torch.equal, answer, expected))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_flow_of_16_bits_is_solved_in_float32(dtype: torch.dtype, stored: set[Any]) -> None:
    """As its weights in float32 are, without a copy of them."""
    case = CASES["heads of 48"]
    flow = case.flow().to(dtype)
    answer = invert(case, flow)
    assert stored == {(dtype, True)}
    assert all(map(torch.equal, answer, invert(case, deepcopy(flow).float())))


@pytest.mark.parametrize("name", ["heads of 48", "STARFlow, heads of 64"])
def test_a_flow_in_float64(name: str, stored: set[Any]) -> None:
    case = CASES[name]
    flow = case.flow().double()
    x, log_det = invert(case, flow, torch.float64)
    assert stored == {(torch.float64, True)}
    answer = case.answer(flow, case.z(flow).double())
    assert relative_error(x, answer) < 1e-13
    torch.testing.assert_close(log_det, case.log_det(flow, answer), rtol=1e-11, atol=1e-11)


def test_large_weights_are_read_where_they_lie(stored: set[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MIN_IN_PLACE", 0)
    flow = rounded(WHOLE_VECTORS.flow(), torch.bfloat16)
    reference = WHOLE_VECTORS.answer(flow, WHOLE_VECTORS.z(flow))
    answers = [invert(WHOLE_VECTORS, flow), invert(WHOLE_VECTORS, deepcopy(flow).bfloat16())]
    monkeypatch.setattr(native.load_library(), "has_fast_halves", False)
    answers.append(invert(WHOLE_VECTORS, flow))
    assert stored == {(torch.bfloat16, False), (torch.float32, False)}
    assert relative_error(answers[0][0], reference) < 3e-6
    for answer in answers[1:]:
        assert all(map(torch.equal, answer, answers[0]))
    double = invert(WHOLE_VECTORS, flow.double(), torch.float64)
    assert relative_error(double[0], reference) < 1e-13
    case = CASES["7 wide"]  # which make no whole vectors
    stored.clear()
    invert(case, case.flow())
    assert stored == {(torch.float32, True)}


def test_half_numbers_of_every_kind() -> None:
    """Subnormal ones, and the largest: float32 reads the same."""
    case = CASES["heads of 32"]
    flow = rounded(case.flow(), torch.float16)
    with torch.no_grad():
        weight = flow.blocks[1].attn_blocks[0].mlp.main[0].weight
        weight[0, :4] = torch.tensor([2.0**-24, -(2.0**-15), 65504.0, -0.0])
    answer = invert(case, flow)
    assert relative_error(answer[0], case.answer(flow, case.z(flow))) < 3e-6
