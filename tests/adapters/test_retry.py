"""Rows that fail in float32 are solved in float64 where that is asked for."""

from __future__ import annotations

import pytest
import torch
import zuko
from library_flows import CASES, CONTEXT, normal, same_bits
from nflows.transforms import MaskedPiecewiseRationalQuadraticAutoregressiveTransform
from torch import Tensor

import jacobiflow as jf

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["zuko user's own", "nflows affine", "normflows affine"])
def test_rows_that_overflow_in_float32_are_those_of_float64(name: str) -> None:
    case, y, c = CASES[name], normal(6, 8), normal(6, CONTEXT, seed=1)
    flow = case.make(CONTEXT, 8)
    y[2] *= 1e38  # finite, but the sums of the network overflow
    y[4, 0] = torch.nan
    with torch.no_grad():
        plain = case.invert(flow, y, c)
        with jf.accelerate(flow, retry_float64=True) as done:
            found = case.invert(flow, y, c)
        expected = case.invert(case.make(CONTEXT, 8, dtype=torch.float64), y.double(), c.double())
    assert not plain[0][2].isfinite().all()
    others = [0, 1, 3]
    assert same_bits([x[others] for x in plain], [x[others] for x in found])
    for ours, its in zip(found, expected, strict=True):
        torch.testing.assert_close(ours[2], its[2].float())  # infinite where it is too large for float32
    assert done.retried == 1
    with torch.no_grad(), jf.accelerate(flow) as off:
        case.invert(flow, y, c)
    assert off.retried == 0


@pytest.mark.parametrize("rows", [0, 6])
def test_batches_of_any_shape_keep_their_bits_if_none_fails(rows: int) -> None:
    torch.manual_seed(1)
    flow = zuko.flows.MAF(64, transforms=3, hidden_features=(256,)).eval()
    y = normal(3, rows, 64).transpose(0, 1)  # PyTorch rounds it differently from rows of a matrix
    with torch.no_grad():
        expected = [flow().transform.inv(each) for each in (y, normal(64))]
        with jf.accelerate(flow, retry_float64=True) as done:
            found = [flow().transform.inv(each) for each in (y, normal(64))]
    assert same_bits(expected, found)
    assert done.retried == 0


class Assertive(MaskedPiecewiseRationalQuadraticAutoregressiveTransform):
    """Fails in float32, as nflows does when a discriminant rounds to less than 0."""

    error: type[Exception] = AssertionError

    def _elementwise_inverse(self, inputs: Tensor, autoregressive_params: Tensor) -> tuple[Tensor, Tensor]:
        if inputs.dtype == torch.float32:
            raise self.error
        return super()._elementwise_inverse(inputs, autoregressive_params)


def test_a_batch_that_raises_an_error_is_solved_in_float64() -> None:
    torch.manual_seed(0)
    flow, y = Assertive(8, 16, tails="linear").eval(), normal(5, 8)
    with torch.no_grad():
        with jf.accelerate(flow), pytest.raises(AssertionError):
            flow.inverse(y)
        with jf.accelerate(flow, retry_float64=True) as done:
            x, logabsdet = flow.inverse(y)
        back, other = flow(x)
    assert done.retried == 5
    assert x.dtype == logabsdet.dtype == torch.float32
    torch.testing.assert_close(back, y, rtol=0, atol=1e-4)
    torch.testing.assert_close(other, -logabsdet, rtol=0, atol=1e-3)


def test_out_of_memory_is_no_reason_to_take_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Assertive, "error", torch.OutOfMemoryError)
    flow = Assertive(8, 16, tails="linear").eval()
    with torch.no_grad(), jf.accelerate(flow, retry_float64=True) as done, pytest.raises(torch.OutOfMemoryError):
        flow.inverse(normal(5, 8))
    assert done.retried == 0
