"""pyro's autoregressive transforms against their own inverses, and lampe's flows, which are zuko's."""

from __future__ import annotations

import copy
import pickle

import lampe
import pyro.distributions.transforms as pt
import pytest
import torch
from pyro.nn import AutoRegressiveNN
from torch import Tensor, nn

import jacobiflow as jf
from tests.helpers.library_flows import normal
from tests.helpers.random_flows import same_bits, values

pytestmark = pytest.mark.usefixtures("one_thread")

D, C = 7, 3


@torch.no_grad()
def test_strides_and_integers_are_taken_as_pyro_takes_them() -> None:
    flow = pt.affine_autoregressive(D, [32, 32])
    for y in (normal(D, 3).t(), normal(D, 2, 4).permute(1, 2, 0), torch.arange(5 * D).view(5, D) % 4):
        expected = flow._inverse(y)
        with jf.accelerate(flow, 0.0) as handle:
            assert same_bits(expected, flow._inverse(y))
        assert handle.ways == {"": "passes" if y.is_floating_point() else "library"}


class Doubled(nn.Module):
    """A user's network."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = AutoRegressiveNN(D, [32])
        self.permutation, self.func = self.inner.permutation, torch.tanh  # a name that partial calls have too

    def forward(self, x: Tensor) -> list[Tensor]:
        return [2 * part for part in self.inner(x)]


@pytest.mark.parametrize("rows", [5, 3000])
@torch.no_grad()
def test_networks_of_the_user(rows: int) -> None:
    flow, y = pt.AffineAutoregressive(Doubled()), normal(rows, D)
    expected = values(flow, y, None, True)
    with jf.accelerate(flow, 0.0) as handle:
        assert same_bits(expected, values(flow, y, None, True))
    assert handle.ways == {"": "passes"}


@torch.no_grad()
def test_copies_pickles_and_what_is_left_alone() -> None:
    flow, y = pt.affine_autoregressive(D, [32, 32]), normal(4, D)
    kind, expected = type(flow), values(flow, y, None, True)
    with jf.accelerate(flow, 0.0):
        copied = copy.deepcopy(flow)
        loaded = pickle.loads(pickle.dumps(flow))
    assert type(flow) is type(loaded) is type(copied) is kind
    for each in (copied, loaded):
        assert same_bits(expected, values(each, y, None, True))
    stable = pt.affine_autoregressive(D, [32], stable=True)
    with pytest.raises(ValueError, match="its _inverse was replaced"):
        jf.accelerate(stable, 0.0)


def test_estimators_of_lampe() -> None:
    estimator = lampe.inference.NPE(D, C, transforms=2, hidden_features=(32, 32))
    with torch.no_grad(), jf.accelerate(estimator) as handle:
        estimator.flow(normal(C)).sample((20,))
    assert list(handle.ways.values()) == ["native", "native"]
