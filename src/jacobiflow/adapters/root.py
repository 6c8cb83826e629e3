"""Roots of monotone functions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

_MAX_EVALUATIONS = 100  # bisection alone needs 55 in float64
_MAX_BOUND = 2.0**20


def find_bound(function: Callable[[Tensor], Tensor], y: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """Returns a bound b for each entry, such that an increasing f has f(-b) <= y <= f(b). It is at most 2^20."""
    bound = torch.ones_like(y)
    while not (is_enough := (function(-bound) <= y) & (y <= function(bound)) | (bound == _MAX_BOUND)).all():
        bound = torch.where(is_enough, bound, 4 * bound)
    return bound


def find_root(
    function: Callable[[Tensor], Tensor], y: Float[Tensor, "*b"], bound: Float[Tensor, "*b"] | float
) -> Float[Tensor, "*b"]:
    """Solves f(x) = y for an increasing f of each entry in [-bound, bound], by Chandrupatla's method.

    If f does not reach y, the solution is the nearer bound. It is NaN if f is.

    References:
        T. R. Chandrupatla, A new hybrid quadratic/bisection algorithm for finding the zero of a nonlinear function
        without using derivatives (1997), https://doi.org/10.1016/S0965-9978(96)00051-8.
    """
    tolerance = bound * torch.finfo(y.dtype).eps
    b = torch.ones_like(y) * bound
    a = -b
    of_a, of_b = function(a), function(b)
    y = y.clamp(of_a, of_b)
    of_a, of_b = of_a - y, of_b - y
    share = torch.full_like(y, 0.5)  # The next point is this share of the way from a to b.
    for _ in range(_MAX_EVALUATIONS):
        x = a + share * (b - a)
        of_x = function(x) - y
        is_beside_a = (of_x > 0) == (of_a > 0)
        c, of_c = torch.where(is_beside_a, a, b), torch.where(is_beside_a, of_a, of_b)
        b, of_b = torch.where(is_beside_a, b, a), torch.where(is_beside_a, of_b, of_a)
        a, of_a = x, of_x
        length = (b - a).abs()
        if not ((length > 2 * tolerance) & (of_a != 0) & (of_b != 0)).any():
            break
        # The next point is the root of a parabola through three points, or the middle if it is not monotone.
        position, rise = (a - b) / (c - b), (of_a - of_b) / (of_c - of_b)
        is_monotone = (rise**2 < position) & ((1 - rise) ** 2 < 1 - position)
        first, second = of_a / (of_b - of_a) * of_c / (of_b - of_c), of_a / (of_c - of_a) * of_b / (of_c - of_b)
        share = torch.where(is_monotone, first + (c - a) / (b - a) * second, 0.5)
        least = tolerance / length
        share = share.clamp(least, 1 - least).nan_to_num(0.5)
    is_a = ~(of_a.abs() > of_b.abs())  # also if it is NaN
    return torch.where(is_a, a, b) + 0 * torch.where(is_a, of_a, of_b)
