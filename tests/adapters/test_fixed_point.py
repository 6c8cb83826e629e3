"""When passes end: never later than the library's, at tolerance 0 on equal bits, above it row by row."""

from __future__ import annotations

import math

import pytest
import torch
from library_flows import CASES, CONTEXT, MAIN, Additive, Carry, both, made, normal, same_bits
from torch import Tensor

import jacobiflow as jf

pytestmark = pytest.mark.usefixtures("one_thread")

DOUBLE = torch.float64


def same(expected: tuple[Tensor, ...], found: tuple[Tensor, ...], tolerance: float) -> bool:
    if tolerance == 0:
        return same_bits(expected, found)
    return all(torch.allclose(a, b, rtol=0, atol=1e3 * tolerance) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", MAIN)
def test_never_more_passes_than_the_library(name: str, grad: bool) -> None:
    case = CASES[name]
    for features in (2, 5, 6, 24):
        flow, y = case.make(features=features), case.inputs(5, features)
        for tolerance in (0.0, 1e-12, 10.0):
            with torch.set_grad_enabled(grad):
                expected, found, passes, own = both(case, flow, y, None, tolerance)  # compares the counts
            assert set(own.values()) == {features}
            if features < 6:  # by the library's own loop
                assert passes == own
            if features < 6 or tolerance == 0:
                assert same_bits(expected, found)
            elif tolerance == 10:
                assert set(passes.values()) <= {1, 2, 3}


def passes_alone(coefficient: float, tolerance: float) -> int:
    """Of a row (1, 0, ..., 0) in `Carry`: up to the first that changes it by no more than the tolerance."""
    return next((k for k in range(2, 32) if coefficient ** (k - 1) <= tolerance), 32)


def batches(coefficients: list[float], tolerance: float) -> tuple[list[list[float]], dict[float, int]]:
    """The rows in each pass, where rows leave when a quarter of the batch has ended; and the passes of each row."""
    active, seen, passes = coefficients, [], {}
    while True:
        seen.append(active)
        passes |= dict.fromkeys(active, len(seen))
        going = [c for c in active if passes_alone(c, tolerance) > len(seen)]
        if not going:
            return seen, passes
        active = going if len(active) - len(going) >= len(active) / 4 else active


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
@pytest.mark.parametrize(
    "coefficients",
    [
        [0.1, 0.11, 0.12, 0.7, 0.13, 0.14, 0.15, 0.16],
        [0.9, 0.01, 0.5, 0.3, 0.011, 0.7, 0.1, 0.012, 0.6],
        [0.01, 0.3, 0.4, 0.5],  # a quarter leaves at once
        [0.01, 0.3, 0.4, 0.5, 0.6],  # a fifth does not
        [1.0, 0.999],  # all passes: a row does not end with the change of one entry
    ],
    ids=len,
)
def test_rows_leave_the_batch_with_their_contexts(coefficients: list[float], tolerance: float) -> None:
    flow, y = Additive(32, network=Carry()), torch.zeros(len(coefficients), 32, dtype=DOUBLE)
    y[:, 0] = 1
    with jf.accelerate(flow, tolerance) as done:
        x, logabsdet = flow.inverse(y, torch.tensor(coefficients, dtype=DOUBLE)[:, None])
    seen, passes = batches(coefficients, tolerance)
    assert flow.autoregressive_net.contexts == seen
    assert done.passes == {"": len(seen)}
    assert not logabsdet.any()
    for row, c in enumerate(coefficients):
        expected = torch.tensor([c**i if i < passes[c] else 0.0 for i in range(32)], dtype=DOUBLE)
        torch.testing.assert_close(x[row], expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["zuko MAF", "zuko NSF", "nflows affine", "nflows rational", "normflows affine"])
def test_rows_that_are_not_finite_do_not_change_the_others(name: str, bad: float) -> None:
    case, flow, y, c = made(name, DOUBLE)
    y[2, 11], others = bad, [0, 1, 3, 4]
    for tolerance in (0.0, 1e-6):
        with torch.no_grad():
            try:
                case.invert(flow, y, c)
            except Exception as error:  # of splines
                with jf.accelerate(flow, tolerance), pytest.raises(type(error)):
                    case.invert(flow, y, c)
                continue
            expected, found, passes, _ = both(case, flow, y, c, tolerance)
        if tolerance == 0 and name != "zuko NSF":  # where the sign of a NaN changes with each pass
            assert all(count < 24 for count in passes.values())
        assert same([x[others] for x in expected], [x[others] for x in found], tolerance)
        assert [x[2].isfinite().tolist() for x in expected] == [x[2].isfinite().tolist() for x in found]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("tolerance", [0.0, 1e-9])
@pytest.mark.parametrize("name", ["zuko MAF", "nflows affine", "normflows affine"])
def test_empty_batches(name: str, tolerance: float, grad: bool) -> None:
    case, flow, *_ = made(name)
    y = torch.zeros(0, 24, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        expected, found, *_ = both(case, flow, y, torch.zeros(0, CONTEXT), tolerance)
    assert [x.shape for x in expected] == [x.shape for x in found]
    assert not grad or torch.autograd.grad(sum(x.sum() for x in found), y)[0].shape == y.shape


@pytest.mark.parametrize("tolerance", [0.0, 1e-9])
@pytest.mark.parametrize("grad", [False, True])
def test_batches_of_any_shape_strides_and_precision(grad: bool, tolerance: float) -> None:
    y = normal(30, 24, dtype=DOUBLE)
    c = normal(30, CONTEXT, seed=1, dtype=DOUBLE)
    batches = [
        (y[0], c[:7]), (y[:7], c[0]), (y[:3, None], c[:5]), (y[:5], c[:3, None]), (y[:15].view(3, 5, 24), c[:5]),
        (y[:0].view(3, 0, 24), c[0]), (y[:5, None], c[:0]),
        (y[:15].view(24, 3, 5).permute(1, 2, 0), c[0]), (y[0].expand(3, 5, 24), c[0]),
        (y[:15].view(5, 3, 24).transpose(0, 1), None), (y.view(3, 5, 48)[..., ::2], c[:10:2]),
        (y.float(), c),
    ]  # fmt: skip
    for name in ("zuko MAF", "zuko MAF adjacency"):
        case = CASES[name]
        for rows, context in batches:
            flow, before = case.make(0 if context is None else CONTEXT, dtype=DOUBLE), rows.clone()
            with torch.set_grad_enabled(grad):
                expected, found, *_ = both(case, flow, rows, context, tolerance)
            assert expected[0].shape == found[0].shape
            assert found[0].dtype == DOUBLE
            assert same(expected, found, tolerance)
            assert torch.equal(rows, before)


@pytest.mark.parametrize("name", MAIN)
def test_modes_of_pytorch(name: str) -> None:
    for mode in (torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.float16, torch.bfloat16):
        case, flow, y, c = made(name)
        if isinstance(mode, torch.dtype):
            flow, y, c, mode = flow.to(mode), y.to(mode), c.to(mode), torch.no_grad()
        with mode:
            try:
                expected = case.invert(flow, y, c)
            except (RuntimeError, AssertionError) as error:  # of splines that mix types
                with jf.accelerate(flow), pytest.raises(type(error)):
                    case.invert(flow, y, c)
                continue
            with jf.accelerate(flow):
                found = case.invert(flow, y, c)
            with jf.accelerate(flow, 1e-2):
                assert [x.dtype for x in case.invert(flow, y, c)] == [x.dtype for x in expected]
        assert same_bits(expected, found)
        assert [x.is_inference() for x in found] == [x.is_inference() for x in expected]
