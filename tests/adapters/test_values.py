"""Native code on the flows of all libraries, against the libraries' own code in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_flows import FLOWS, Values, exact, inputs, laid_out, values
from torch import Tensor, nn

import jacobiflow as jf

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

BATCHES: list[tuple[int, ...]] = [(1,), (5,), (40,), (70,), (130,)]
SHAPES = {  # of inputs, of the context, and of both together
    "none": ((), ()), "one for all": ((7,), ()), "broadcast": ((3, 1), (2,)), "many": ((2, 1, 3), (2, 4, 3)),
}  # fmt: skip


def gaps(found: Values, expected: Values, period: float) -> list[Tensor]:
    """Errors of the values, on a circle if there is a period, and of the log-determinants."""
    error = (found[0] - expected[0]).abs()
    return [torch.minimum(error, (error - period).abs()), (found[1] - expected[1]).abs()]


def check(flow: nn.Module, x: Tensor, context: Tensor | None, domain: str = "line", way: str = "native") -> None:
    """Both directions, against the library in float64 and, for float32, the errors that it makes itself."""
    for is_inverse in (False, True):
        expected = exact(flow, x, context, is_inverse)
        own = values(flow, x, context, is_inverse) if x.dtype == torch.float32 else expected
        with jf.accelerate(flow) as done:
            found = values(flow, x, context, is_inverse)
        assert set(done.ways.values()) == ({way} if x.numel() else set()), done
        assert [part.shape for part in found] == [part.shape for part in own]
        assert all(part.dtype == x.dtype for part in found)
        period = 2 * math.pi if domain == "circle" else 0.0
        if not x.numel():
            continue
        pairs = zip(gaps(found, expected, period), gaps(own, expected, period), expected, strict=True)
        for error, error_of_library, answer in pairs:
            size = 1 + answer.abs().mean()
            if x.dtype == torch.float64:
                assert error.max() <= 1e-10 * (1 + answer.abs().max())
            else:
                assert error.mean() <= 2 * error_of_library.mean() + 1e-6 * size


@pytest.mark.parametrize("library", FLOWS)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.data())
@torch.no_grad()
def test_random_flows(library: str, data: Any) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 999)))
    features, context = draw(st.integers(2 if library == "zuko" else 1, 12)), draw(st.sampled_from([0, 0, 1, 3]))
    flow, domain = draw(FLOWS[library](features, context))
    dtype, rows = draw(st.sampled_from([torch.float32, torch.float32, torch.float64])), draw(st.sampled_from(BATCHES))
    layout = st.sampled_from(["as they are", "as they are", "transposed", "strided", "expanded"])
    flow.to(dtype).eval()
    for weight in flow.parameters():
        weight *= 1.5
    x = laid_out(inputs(domain, *rows, features, dtype=dtype), draw(layout))
    c = laid_out(torch.randn(*rows, context, dtype=dtype), draw(layout)) if context else None
    torch.set_num_threads(draw(st.integers(1, 2)))
    check(flow, x, c, domain)
