"""Distances to the solution and the error matrix, against sweeps and the dense Jacobian of the oracle."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import jacobiflow as jf
from jacobiflow.calibration import ConvergenceCurve, gamma_norm, gamma_products, initial_residuals, measure_distances
from tests.helpers.calibration_problems import PROBLEMS, dense_gamma, errors_of, problem, randn, runs_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("name", PROBLEMS)
def test_distances_are_those_of_plain_sweeps(name: str, count: int) -> None:
    """In each segment, after the segments before are solved, until a sweep changes almost nothing."""
    p = problem(name)
    for guess in (jf.Latent(), jf.Zeros()):
        curves = measure_distances(p.block, p.answer, p.z, guess, p.labels, count)
        assert len(curves) == count
        for curve, run in zip(curves, runs_of(p.length, count), strict=True):
            expected = errors_of(p.g, p.answer, guess(p.z), run).abs().amax(dim=(2, 3))
            torch.testing.assert_close(curve, expected[: len(curve)], rtol=1e-9, atol=1e-10)
            assert curve[-1].max() <= 1e-5
            assert not curve.is_inference()
        residuals = initial_residuals(p.block, p.answer, p.z, guess, p.labels, count)
        for run in runs_of(p.length, count):
            torch.testing.assert_close(residuals[:, run], errors_of(p.g, p.answer, guess(p.z), run, 1)[1])


def test_a_token_that_overflows_goes_back_to_the_guess_and_is_exact_in_the_end() -> None:
    """For x_t = z_t + exp(x_(t-1) - 1) and a guess far above the solution, each sweep has one overflow less.

    As masked attention does, the map multiplies later tokens by 0, which does not remove a NaN.
    """

    def update(x: torch.Tensor, z: torch.Tensor, start: int, stop: int, cache: None) -> torch.Tensor:
        g = z + torch.cat((torch.zeros_like(x[:, :1]), (x[:, :-1] - 1).exp()), dim=1) + 0 * x.sum()
        return g[:, start:stop]

    block: Any = SimpleNamespace(init_cache=lambda z, context: None, update=update)
    z, x = torch.full((2, 6, 1), -0.3, dtype=torch.float64), torch.zeros(2, 6, 1, dtype=torch.float64)
    for _ in range(6):
        x = update(x, z, 0, 6, None)
    curve = ConvergenceCurve.from_distances(measure_distances(block, x, z, jf.WarmStart(torch.full_like(z, 1000.0))))
    assert curve.largest == curve.median == (pytest.approx(1000, rel=1e-2), *(math.inf,) * 5, 0.0)
    assert set(curve.sweeps.values()) == {(6, 6)}


def test_a_curve_counts_the_sweeps_after_which_the_distance_stays_small() -> None:
    """A distance counts once it stays within the tolerance; a distance that ends above it never counts.

    The second batch has fewer sweeps than the first, and stays at its last distance.
    """
    first = torch.tensor([[1.0, 0.5], [5e-2, 2.0], [0.2, 5e-3], [5e-3, 5e-4], [0.0, 5e-4]])
    second = torch.tensor([[5e-4], [1e-4], [0.0]])
    curve = ConvergenceCurve.from_distances([first, second])
    assert curve.largest == pytest.approx((1.0, 2.0, 0.2, 5e-3, 5e-4))
    assert curve.median == pytest.approx((0.5, 5e-2, 5e-3, 5e-4, 0.0))
    assert curve.sweeps == {1e-1: (3, 2, 0), 1e-2: (3, 2, 0), 1e-3: (4, 3, 0), 1e-4: (4, None, 1)}
    assert curve.sweeps_to_tolerance(1e-4, 7) == (4, 7, 1)
    with pytest.raises(ValueError, match=r"tolerance 0\.5: measured are 0\.1, 0\.01, 0\.001, 0\.0001"):
        curve.sweeps_to_tolerance(0.5, 7)


@pytest.mark.parametrize("name", PROBLEMS)
def test_products_and_norm_are_those_of_the_dense_jacobian(name: str) -> None:
    p = problem(name)
    v = randn(*p.answer.shape)
    product, transposed = gamma_products(p.block, p.answer, p.z, p.labels)
    first, estimate, converged = (gamma_norm(p.block, p.answer, p.z, p.labels, rtol) for rtol in (1.0, 1e-3, 1e-12))
    for n, gamma in enumerate(dense_gamma(p.g, p.answer)):
        row, norm = v[n].flatten().numpy(), np.linalg.norm(gamma, 2)
        assert product(v)[n].flatten().numpy() == pytest.approx(gamma @ row, rel=1e-8, abs=1e-9)
        assert transposed(v)[n].flatten().numpy() == pytest.approx(gamma.T @ row, rel=1e-8, abs=1e-9)
        assert float(converged[n]) == pytest.approx(norm, rel=1e-5)
        assert 0.99 * norm <= float(estimate[n]) <= norm * (1 + 1e-9)
        assert 0 < float(first[n]) < 0.999 * norm  # one step from a random direction


@pytest.mark.parametrize("frozen", [True, False])
def test_the_matrix_of_a_block_that_does_not_depend_on_x_is_0(frozen: bool) -> None:
    flow = jf.TarFlow(jf.TarFlowConfig(1, 6, 3, 16, 1, 1, head_dim=16)).double().requires_grad_(not frozen)
    constant: Any = SimpleNamespace(init_cache=lambda z, context: None, update=lambda x, z, *rest: z + 1)
    x, z = randn(2, 2, 4, 9)
    for block in (constant, flow.blocks[0]):
        assert torch.equal(gamma_norm(block, x, z), torch.zeros(2, dtype=torch.float64))
        for multiply in gamma_products(block, x, z):
            assert torch.equal(multiply(torch.ones_like(x)), torch.zeros_like(x))
