"""When a token is done: rules, how they join, and the paper's early stop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

import jacobiflow as jf
from jacobiflow.solvers import Stopping
from tests.helpers.solver_problems import Problem, error, mixing

pytestmark = pytest.mark.usefixtures("one_thread")


def test_rules_are_values_that_join() -> None:
    assert jf.Tolerance(0.1) | jf.MaxSweeps(3) == jf.MaxSweeps(3) | jf.Tolerance(0.1) == Stopping(0.1, 3)
    assert jf.EarlyStop(0.5) | jf.MaxSweeps([5, 3]) | jf.Tolerance(0) == Stopping(0, (5, 3), 0.5)
    assert jf.EarlyStop() == Stopping(ebound=1e-8)
    assert jf.MaxSweeps(range(1, 4)).max_sweeps == (1, 2, 3)
    assert hash(jf.MaxSweeps([5, 3])) == hash(jf.MaxSweeps((5, 3)))
    assert jf.MaxSweeps((3,)) != jf.MaxSweeps(3)


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (Stopping, "tolerance"),
        (lambda: jf.MaxSweeps(()), r"sweeps=\(\)"),
        (lambda: jf.Tolerance(0.1) | jf.Tolerance(0.1), "both give atol"),
        (lambda: jf.EarlyStop(1) | jf.EarlyStop(2), "both give ebound"),
    ],
)
def test_what_makes_no_sense_is_refused(build: Callable[[], Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        build()


# ---------------------------------------------------------------------------------------- the paper's early stop (A.8)


def early_stopped(problem: Problem, ends: list[int], ebound: float) -> tuple[Tensor, list[int]]:
    """Algorithm 1 of the paper, with no cache: line 6 goes on while ||X_k+1 - X_k|| / (B T C) is above ebound.

    A segment has as many sweeps as it has tokens at most.
    """
    x, sweeps = problem.z.clone(), []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        k, e = 0, math.inf
        while k < end - start and e > ebound:
            old = x[:, start:end].clone()
            x[:, start:end] = problem.g(x)[:, start:end]
            k, e = k + 1, ((x[:, start:end] - old) ** 2).sum().sqrt() / x.numel()
        sweeps.append(k)
    return x, sweeps


@pytest.mark.parametrize("ebound", [1e-2, 1e-3, 1e-6])
@pytest.mark.parametrize("ends", [[17], [5, 11, 17], [8, 17]], ids=str)
def test_early_stop_is_line_6_of_algorithm_1(ends: list[int], ebound: float) -> None:
    """No key that later segments read is older than the last change, which is below the bound."""
    problem = mixing(keys=False, slack=ebound * 100)
    partition = jf.Segments(len(ends)) if len(ends) > 1 else jf.Whole()
    x, sweeps = early_stopped(problem, ends, ebound)
    found = jf.solve(problem.block, problem.z, jf.Solver(partition, stopping=jf.EarlyStop(ebound)))
    assert [sum(stop == end for _, stop, _ in problem.block.calls) for end in ends] == sweeps
    assert found.sweeps == sum(sweeps) <= 17
    # A sweep leaves out the tokens that earlier ones made exact: they move by rounding only.
    assert error(found.x, x) < 1e-12
    assert (found.status == jf.Status.CONVERGED).all()
