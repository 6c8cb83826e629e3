"""The error matrix Gamma = dg/dx against the dense Jacobian of the oracle's map."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import jacobiflow as jf
from jacobiflow.calibration import gamma_norm, gamma_products
from tests.helpers.calibration_problems import PROBLEMS, dense_gamma, problem, randn

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", PROBLEMS)
def test_products_and_norm_are_those_of_the_dense_jacobian(name: str) -> None:
    p = problem(name)
    v = randn(*p.answer.shape)
    product, transposed = gamma_products(p.block, p.answer, p.z, p.labels)
    estimate = gamma_norm(p.block, p.answer, p.z, p.labels)
    converged = gamma_norm(p.block, p.answer, p.z, p.labels, rtol=1e-12)
    first = gamma_norm(p.block, p.answer, p.z, p.labels, rtol=1.0)
    for n, gamma in enumerate(dense_gamma(p.g, p.answer)):
        row, norm = v[n].flatten().numpy(), np.linalg.norm(gamma, 2)
        assert product(v)[n].flatten().numpy() == pytest.approx(gamma @ row, rel=1e-8, abs=1e-9)
        assert transposed(v)[n].flatten().numpy() == pytest.approx(gamma.T @ row, rel=1e-8, abs=1e-9)
        assert float(converged[n]) == pytest.approx(norm, rel=1e-5)
        assert 0.99 * norm <= float(estimate[n]) <= norm * (1 + 1e-9)
        assert 0 < float(first[n]) < 0.999 * norm  # one row from a random direction


@pytest.mark.parametrize("name", ["constant", "fresh flow", "frozen fresh flow"])
def test_the_matrix_of_a_block_that_does_not_depend_on_x_is_0(name: str) -> None:
    block: Any = SimpleNamespace(init_cache=lambda z, context: None, update=lambda x, z, *rest: z + 1)
    if name != "constant":
        flow = jf.TarFlow(jf.TarFlowConfig(1, 6, 3, 16, 1, 1, head_dim=16)).double()
        block = flow.requires_grad_(name != "frozen fresh flow").blocks[0]
    x, z = randn(2, 2, 4, 9)
    assert torch.equal(gamma_norm(block, x, z), torch.zeros(2, dtype=torch.float64))
    for multiply in gamma_products(block, x, z):
        assert torch.equal(multiply(torch.ones_like(x)), torch.zeros_like(x))
