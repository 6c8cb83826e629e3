"""Couplings and linear transforms by L U in native code, against PyTorch's own operations in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from jacobiflow.errors import UnsupportedError
from jacobiflow.native.boundary import Activation, TransformKind
from jacobiflow.native.chain import TransformChain
from jacobiflow.native.masked_network import MaskedNetwork
from jacobiflow.native.transforms import ChainTransform, constant_transform, coupling_transform, lu_transform

HIDDEN, CONTEXT, ROWS = 11, 3, 37
Tensors = list[Tensor]
Oracle = Callable[[Tensor, Tensor, Tensors], tuple[Tensor, Tensor]]


def affine_coupling(identity: list[int], transformed: list[int]) -> tuple[ChainTransform, Oracle]:
    """A coupling whose network reads the context after its features, and has a gated residual block."""
    outputs = torch.arange(2 * len(transformed)).view(2, -1).t()  # all log-scales, then all shifts
    columns = range(len(identity), len(identity) + CONTEXT)
    network = MaskedNetwork(outputs, columns, inputs=len(identity))
    before = network.add_linear(0, HIDDEN)
    value = network.add_linear(network.add_activation(before, activation=Activation.RELU), HIDDEN)
    value = network.add_sum(network.add_context(value, CONTEXT, is_gate=True), before)
    network.add_linear(value, 2 * len(transformed))

    def oracle(x: Tensor, context: Tensor, tensors: Tensors) -> tuple[Tensor, Tensor]:
        first, second, gate, last = [F.linear] * 4  # each with its weight and bias
        before = first(torch.cat((x[:, identity], context.expand(len(x), -1)), dim=1), *tensors[0:2])
        hidden = second(before.relu(), *tensors[2:4])
        hidden = hidden * gate(context, *tensors[4:6]).sigmoid() + before
        log_scale, shift = last(hidden, *tensors[6:8]).chunk(2, dim=1)
        y = x.clone()
        y[:, transformed] = log_scale.exp() * x[:, transformed] + shift
        return y, log_scale.sum(dim=1)

    return coupling_transform(network, identity, transformed, kind=TransformKind.MASKED_AFFINE), oracle


def lu_linear(features: int) -> tuple[ChainTransform, Oracle]:
    entries = features * (features - 1) // 2
    holder = dict(zip("ludb", map(torch.zeros, (entries, entries, features, features)), strict=True))
    lower, upper, diagonal, shift = ((holder, name) for name in holder)

    def oracle(x: Tensor, context: Tensor, tensors: Tensors) -> tuple[Tensor, Tensor]:
        rows, columns = torch.tril_indices(features, features, -1)
        of_lower = torch.eye(features, dtype=x.dtype).index_put((rows, columns), tensors[0])
        rows, columns = torch.triu_indices(features, features, 1)
        of_diagonal = F.softplus(tensors[2]) + 1e-3
        of_upper = of_diagonal.diag().index_put((rows, columns), tensors[1])
        return x @ (of_lower @ of_upper).T + tensors[3], of_diagonal.log().sum().expand(len(x))

    return lu_transform(lower, upper, diagonal, shift, min_scale=1e-3), oracle


def constant_affine(features: int, transformed: list[int]) -> tuple[ChainTransform, Oracle]:
    holder = {"log_scale": torch.zeros(len(transformed)), "shift": torch.zeros(len(transformed), 1)}

    def oracle(x: Tensor, context: Tensor, tensors: Tensors) -> tuple[Tensor, Tensor]:
        y = x.clone()
        y[:, transformed] = tensors[0].exp() * x[:, transformed] + tensors[1][:, 0]
        return y, tensors[0].sum().expand(len(x))

    places = [(holder, name) for name in holder]
    return constant_transform(places, features, transformed, kind=TransformKind.MASKED_AFFINE), oracle


def compose(*parts: tuple[ChainTransform, Oracle]) -> tuple[TransformChain, Oracle]:
    def oracle(x: Tensor, context: Tensor, tensors: Tensors) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(len(x))
        for transform, part in parts:
            count = len(transform.shapes)
            x, change = part(x, context, tensors[:count])
            log_det, tensors = log_det + change, tensors[count:]
        return x, log_det

    return TransformChain([transform for transform, _ in parts]), oracle


CASES = {
    "coupling": lambda: compose(affine_coupling([3, 0], [1, 4, 2])),
    "coupling that reads the context only": lambda: compose(affine_coupling([], [0])),
    "parameters that are tensors": lambda: compose(constant_affine(4, [2, 0]), affine_coupling([1, 2], [3, 0])),
    "two couplings and L U": lambda: compose(
        affine_coupling([1, 2], [3, 0]), lu_linear(4), affine_coupling([0, 3], [1, 2])
    ),
    "L U of more features than a vector has": lambda: compose(
        lu_linear(19), affine_coupling([*range(9)], [*range(9, 19)])
    ),
}  # fmt: skip


@pytest.mark.parametrize("is_inverse", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_those_of_the_equations(name: str, is_inverse: bool) -> None:
    chain, oracle = CASES[name]()
    torch.manual_seed(0)
    tensors = [0.2 * torch.randn(shape, dtype=torch.float64) for shape in chain.shapes]
    x = torch.randn(ROWS, chain.features, dtype=torch.float64)
    shared_context = torch.randn(1, CONTEXT, dtype=torch.float64)
    for context in (shared_context, torch.randn(ROWS, CONTEXT, dtype=torch.float64)):
        y, log_det = oracle(x, context, tensors)
        start, end, sign = (y, x, -1) if is_inverse else (x, y, 1)
        values, log_dets, failed = chain.evaluate(tensors, start, context, is_inverse, "rows")
        assert failed is None
        torch.testing.assert_close(values, end, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(log_dets, sign * log_det, rtol=1e-11, atol=1e-11)
        leaves = [t.clone().requires_grad_() for t in (start, context, *tensors)]
        values, log_dets, _ = chain.evaluate(leaves[2:], leaves[0], leaves[1], is_inverse, "rows")
        assert log_dets is not None
        weights = torch.randn_like(values)
        loss = (weights * values).sum() + log_dets.sin().sum()
        gradients = torch.autograd.grad(loss, leaves)
        expected = _gradients_of_equations(oracle, leaves, end, weights, is_inverse)
        for of_native, of_equations in zip(gradients, expected, strict=True):
            torch.testing.assert_close(of_native, of_equations, rtol=1e-9, atol=1e-9)


def _gradients_of_equations(
    oracle: Oracle, leaves: Tensors, end: Tensor, weights: Tensor, is_inverse: bool
) -> tuple[Tensor, ...]:
    """The gradients by autograd; those of an inverse by the implicit function theorem, x <- x - J^-1 (f(x) - y)."""
    start, context, *tensors = leaves
    if not is_inverse:
        values, log_dets = oracle(start, context, tensors)
        return torch.autograd.grad((weights * values).sum() + log_dets.sin().sum(), leaves)
    jacobians = torch.stack([
        torch.autograd.functional.jacobian(
            lambda row, c=c: oracle(row[None], c[None], [t.detach() for t in tensors])[0][0], row
        )
        for row, c in zip(end, context.detach().expand(len(end), -1), strict=True)
    ])  # fmt: skip
    residual = oracle(end, context, tensors)[0] - start
    values = end - torch.linalg.solve(jacobians, residual.unsqueeze(-1)).squeeze(-1)
    log_dets = -oracle(values, context, tensors)[1]
    return torch.autograd.grad((weights * values).sum() + log_dets.sin().sum(), leaves)


def test_networks_that_do_not_fit_their_coupling_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="other sizes than its coupling"):
        affine_coupling([0, 1], [1, 2])
