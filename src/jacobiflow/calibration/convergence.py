"""Convergence of a block's sweeps: residuals, distances to the solution, and the error matrix Gamma."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from jacobiflow.blocks.base import Block, no_gradients
from jacobiflow.blocks.context import Context
from jacobiflow.errors import InputValueError
from jacobiflow.fixed_point import Guess, Segments
from jacobiflow.fixed_point.problem import Problem

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)
# A sweep that changes no entry by more than this is the last one; rounding may go on changing the last bits.
_CONVERGED_CHANGE = 0.1 * min(TOLERANCES)
_MAX_LANCZOS_STEPS = 100


@dataclass(frozen=True)
class ConvergenceCurve:
    """Distance to the solution X* by number of sweeps: the largest |X^(k) - X*| of an entry.

    Attributes:
        median: Median over the samples; entry k is after k sweeps.
        largest: Largest over the samples; entry k is after k sweeps.
        sweeps: For each of `TOLERANCES`, the number of sweeps of each sample until its distance stays within it; `None`
            if rounding keeps the distance above.
    """

    median: tuple[float, ...]
    largest: tuple[float, ...]
    sweeps: Mapping[float, tuple[int | None, ...]]

    def sweeps_to_tolerance(self, tolerance: float, max_sweeps: int) -> tuple[int, ...]:
        """Returns each sample's sweeps to a tolerance that was measured; `max_sweeps` if rounding keeps it above."""
        if tolerance not in self.sweeps:
            raise InputValueError(f"tolerance {tolerance}: measured are {', '.join(f'{t:g}' for t in self.sweeps)}")
        return tuple(max_sweeps if count is None else count for count in self.sweeps[tolerance])

    @classmethod
    def from_distances(cls, batches: Sequence[Float[Tensor, "k b"]]) -> ConvergenceCurve:
        """Summarises the distances of batches: a row for each number of sweeps, a column for each sample.

        If a batch has fewer rows than another, it stays at its last distance.
        """
        longest = max(map(len, batches))
        distances = torch.cat([torch.cat((b, b[-1:].expand(longest - len(b), -1))) for b in batches], dim=1)
        return cls(
            median=tuple(distances.median(dim=1).values.tolist()),
            largest=tuple(distances.amax(dim=1).tolist()),
            sweeps={tolerance: tuple(_count_sweeps(row, tolerance) for row in distances.T) for tolerance in TOLERANCES},
        )


def _count_sweeps(distances: Float[Tensor, " k"], tolerance: float) -> int | None:
    """Counts a sample's sweeps until its distance stays within the tolerance; `None` if it ends above."""
    above = (distances > tolerance).nonzero()
    sweeps = int(above[-1]) + 1 if len(above) else 0
    return sweeps if sweeps < len(distances) else None


def initial_residuals(
    block: Block, x: Float[Tensor, "b t c"], z: Float[Tensor, "b t c"], guess: Guess,
    context: Tensor | Context | None = None, num_segments: int = 1,
) -> Float[Tensor, "b t c"]:  # fmt: skip
    """Computes g(X^(0)) - X*, the residual in IGM (eq. 4); X* is `x`, the solution at `z`.

    Each segment is swept once from the guess; the segments before it are solved.
    """
    problem = Problem.checked(block, z, context)
    problem.check_same_shape("x", x)
    with no_gradients(block):
        residuals = [
            block.update(start, z, run.start, run.stop, cache) - x[:, run]
            for run, start, cache in _each_segment(problem, x, guess, num_segments)
        ]
    return torch.cat(residuals, dim=1)


def measure_distances(
    block: Block, x: Float[Tensor, "b t c"], z: Float[Tensor, "b t c"], guess: Guess,
    context: Tensor | Context | None = None, num_segments: int = 1,
) -> list[Float[Tensor, "k b"]]:  # fmt: skip
    """Measures, per segment, the largest |X^(k) - X*| of each sample after k = 0, 1, ... sweeps.

    X* is `x`, the solution at `z`. A segment starts from the guess, and the segments before it are solved (Figure 5 of
    the paper; Figure 2 for one segment). The last sweep is the first that changes no entry by more than 1e-5. A small
    distance does not end the sweeps, because an error may grow again. After T sweeps a segment of T tokens is exact
    (Proposition 1). If a token overflows, the distance is infinite, and the token is set back to the guess.
    """
    problem = Problem.checked(block, z, context)
    problem.check_same_shape("x", x)
    curves = []
    with no_gradients(block):
        for run, start, cache in _each_segment(problem, x, guess, num_segments):
            current = start.clone()
            curve = [_distance(current[:, run], x[:, run])]
            for front in range(run.start, run.stop):  # tokens before it are final, by Proposition 1
                rest = slice(front, run.stop)
                g = block.update(current, z, front, run.stop, cache)
                has_converged = float((g - current[:, rest]).abs().max()) <= _CONVERGED_CHANGE
                curve.append(_distance(torch.cat((current[:, run.start : front], g), dim=1), x[:, run]))
                current[:, rest] = torch.where(torch.isfinite(g).all(dim=-1, keepdim=True), g, start[:, rest])
                if has_converged:
                    break
            curves.append(torch.stack(curve))
    return [curve.clone() for curve in curves]  # ordinary tensors, not those of inference mode


def segment_slices(num_tokens: int, num_segments: int) -> list[slice]:
    """Returns the tokens of each segment of `Segments(num_segments)`."""
    Segments(num_segments).check(num_tokens)
    bounds = [k * num_tokens // num_segments for k in range(num_segments + 1)]
    return list(map(slice, bounds, bounds[1:]))


def _each_segment(problem: Problem, x: Tensor, guess: Guess, num_segments: int) -> Iterator[tuple[slice, Tensor, Any]]:
    """Yields each segment, its start (solved tokens, then the guess), and the cache of the tokens before it."""
    block, z = problem.block, problem.z
    cache, start = block.init_cache(z, problem.context), guess(z)
    for run in segment_slices(z.shape[1], num_segments):
        yield run, torch.cat((x[:, : run.start], start[:, run.start :]), dim=1), cache
        if run.stop < z.shape[1]:
            block.update(x, z, run.start, run.stop, cache)  # adds the keys of the solution to the cache


def _distance(x: Tensor, answer: Tensor) -> Float[Tensor, " b"]:
    return (x - answer).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).amax(dim=(1, 2))


def gamma_products(
    block: Block, x: Float[Tensor, "b t c"], z: Float[Tensor, "b t c"], context: Tensor | Context | None = None
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Builds the maps v -> Gamma v and v -> Gamma^T v on (B, T, C), where Gamma = dg/dx at `x`, for each sample.

    Near a solution a sweep multiplies the error by Gamma: e^(k+1) = Gamma e^(k) (eq. 6 of the paper, whose gamma_ti has
    the opposite sign). Gamma is strictly lower triangular in the tokens.
    """
    problem = Problem.checked(block, z, context)
    problem.check_same_shape("x", x)
    # Only the math kernel of attention can be differentiated twice.
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        x, z = x.clone().requires_grad_(), z.clone()
        g, _ = Problem(block, z, problem.context).evaluate(x)
        g = g + 0 * x  # has a graph even if g does not depend on x
        w = torch.zeros_like(g).requires_grad_()
        (transposed,) = torch.autograd.grad(g, x, w, create_graph=True)

    def product(v: Tensor) -> Tensor:  # Gamma^T w is linear in w, so its derivative along v is Gamma v
        return torch.autograd.grad(transposed, w, v, retain_graph=True)[0]

    def transposed_product(v: Tensor) -> Tensor:
        return torch.autograd.grad(g, x, v, retain_graph=True)[0]

    return product, transposed_product


def gamma_norm(
    block: Block, x: Float[Tensor, "b t c"], z: Float[Tensor, "b t c"], context: Tensor | Context | None = None,
    rtol: float = 1e-3,
) -> Float[Tensor, " b"]:  # fmt: skip
    """Computes the spectral norm of Gamma = dg/dx at `x`, per sample, by Golub-Kahan-Lanczos bidiagonalisation.

    Each step takes a product with Gamma and one with Gamma^T, and adds a row to a bidiagonal matrix. The norm of that
    matrix grows towards the norm of Gamma. The steps end once none of the samples' norms grows by more than the
    fraction `rtol`, or after 100 steps.
    """
    product, transposed_product = gamma_products(block, x, z, context)
    start = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype, device="cpu").to(x.device)
    right, _ = _orthonormal(start, [])
    rights, lefts, diagonal, above = [right], list[Tensor](), list[Tensor](), list[Tensor]()
    norm = x.new_zeros(len(x))
    for _ in range(_MAX_LANCZOS_STEPS):
        left, length = _orthonormal(product(right), lefts)
        lefts.append(left)
        diagonal.append(length)
        right, length = _orthonormal(transposed_product(left), rights)
        rights.append(right)
        above.append(length)
        rows = F.pad(torch.stack(diagonal, 1).diag_embed(), (0, 1)) + F.pad(torch.stack(above, 1).diag_embed(), (1, 0))
        last, norm = norm, torch.linalg.matrix_norm(rows, 2)
        if ((norm - last).abs() <= rtol * norm).all():
            break
    return norm


def _orthonormal(v: Float[Tensor, "b t c"], basis: Sequence[Tensor]) -> tuple[Tensor, Float[Tensor, " b"]]:
    """Makes `v` orthogonal to the unit vectors of `basis`; returns it with length 1, and its length before."""
    for other in (*basis, *basis):  # the second time removes what rounding leaves
        v = v - (v * other).sum(dim=(1, 2), keepdim=True) * other
    length = v.norm(dim=(1, 2), keepdim=True)
    return v / length.clamp(min=torch.finfo(v.dtype).tiny), length.flatten()
