"""The steps that follow from the masks of a network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jacobiflow.errors import UnsupportedError
from jacobiflow.native.boundary import Activation, TransformKind
from jacobiflow.native.chain import TransformChain
from jacobiflow.native.masked_network import MaskedNetwork, find_order
from jacobiflow.native.transforms import coupling_transform, masked_transform

FEATURES = 4
OUTPUTS = torch.arange(2 * FEATURES).view(FEATURES, 2)


def network_of(reads: Tensor, is_residual: bool = False) -> MaskedNetwork:
    """A network whose parameters of feature i read the features j with reads[i, j], by two hidden units each."""
    network, hidden = MaskedNetwork(OUTPUTS), torch.eye(FEATURES, dtype=torch.bool).repeat_interleave(2, dim=0)
    value = network.add_linear(0, len(hidden), hidden, activation=Activation.TANH)
    if is_residual:
        value = network.add_sum(network.add_linear(value, len(hidden), hidden.repeat_interleave(2, dim=1)), value)
    network.add_linear(value, 2 * len(reads), reads.repeat_interleave(2, dim=0).repeat_interleave(2, dim=1))
    return network


READS = {
    "MADE": (torch.ones(FEATURES, FEATURES).tril(-1), [0, 1, 2, 3, 4]),
    "reversed": (torch.ones(FEATURES, FEATURES).triu(1), [0, 1, 2, 3, 4]),
    "coupling": (torch.tensor([[0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0]]), [0, 2, 4]),
    "no feature": (torch.zeros(FEATURES, FEATURES), [0, 4]),
}


@pytest.mark.parametrize("is_residual", [False, True])
@pytest.mark.parametrize("name", READS)
def test_a_feature_is_solved_once_all_that_it_reads_is(name: str, is_residual: bool) -> None:
    reads, starts = READS[name]
    network = network_of(reads.bool(), is_residual)
    order = find_order(network)
    assert order.starts == starts
    position = torch.tensor(order.features).argsort()
    assert all(position[j] < position[i] for i, j in reads.nonzero().tolist())
    chain = TransformChain([masked_transform(network, kind=TransformKind.MASKED_AFFINE)])
    torch.manual_seed(0)
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in network.shapes]
    x = torch.randn(9, FEATURES, dtype=torch.float64)
    y, log_det, _ = chain.evaluate(tensors, x, None, False, "rows")
    inverse, log_det_of_inverse, _ = chain.evaluate(tensors, y, None, True, "rows")
    torch.testing.assert_close(inverse, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(log_det_of_inverse, -log_det, rtol=0, atol=1e-9)


def test_networks_that_do_not_fit_are_refused() -> None:
    reads = READS["MADE"][0].bool()
    with pytest.raises(UnsupportedError, match="not autoregressive"):
        find_order(network_of(reads | torch.eye(FEATURES, dtype=torch.bool)))
    with pytest.raises(UnsupportedError, match="not the parameters"):
        network = network_of(reads)
        network.outputs = OUTPUTS + 1
        find_order(network)
    with pytest.raises(UnsupportedError, match="another shape"):
        network_of(reads[:, 1:])
    with pytest.raises(UnsupportedError, match="parameters of other sizes"):
        masked_transform(network_of(reads), kind=TransformKind.RATIONAL_QUADRATIC, bins=2)
    with pytest.raises(UnsupportedError, match="other sizes than its coupling"):
        coupling_transform(network_of(reads), [0, 1], [2, 3], kind=TransformKind.MASKED_AFFINE)
