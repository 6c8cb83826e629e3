"""The convergence of a block's plain sweeps: residuals, distances to the solution, and the error matrix Gamma."""

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
_SETTLED = 0.1 * min(TOLERANCES)  # the last bits of a float32 keep changing for as many sweeps as there are tokens
_MOST_ROWS = 100  # of the bidiagonal matrix in `gamma_norm`


@dataclass(frozen=True)
class ConvergenceCurve:
    """Distance to X*, the largest |X^(k) - X*| over tokens and channels, after k = 0, 1, ... plain sweeps.

    Attributes:
        median: Median over the samples, entry k after k sweeps.
        largest: Largest over the samples.
        sweeps: For each of `TOLERANCES`, how many sweeps each sample takes until its distance stays within it; `None`
            if rounding keeps the distance above.
    """

    median: tuple[float, ...]
    largest: tuple[float, ...]
    sweeps: Mapping[float, tuple[int | None, ...]]

    def sweeps_to_tolerance(self, tolerance: float, most: int) -> tuple[int, ...]:
        """The sweeps of each sample to a tolerance that was measured; `most` if rounding keeps it above."""
        if tolerance not in self.sweeps:
            raise InputValueError(f"tolerance {tolerance}: measured are {', '.join(f'{t:g}' for t in self.sweeps)}")
        return tuple(most if count is None else count for count in self.sweeps[tolerance])

    @classmethod
    def of(cls, batches: Sequence[Float[Tensor, "k b"]]) -> ConvergenceCurve:
        """The trace of the distances of batches: a row for each number of sweeps, a column for each sample.

        If a batch has fewer rows than another, it stays at its last distance.
        """
        longest = max(map(len, batches))
        distances = torch.cat([torch.cat((b, b[-1:].expand(longest - len(b), -1))) for b in batches], dim=1)
        return cls(
            median=tuple(distances.median(dim=1).values.tolist()),
            largest=tuple(distances.amax(dim=1).tolist()),
            sweeps={tolerance: tuple(_reached(row, tolerance) for row in distances.T) for tolerance in TOLERANCES},
        )


def initial_residuals(
    block: Block, x: Float[Tensor, "b t c"], z: Float[Tensor, "b t c"], guess: Guess,
    context: Tensor | Context | None = None, count: int = 1,
) -> Float[Tensor, "b t c"]:  # fmt: skip
    """Computes g(X^(0)) - X*, the residual in IGM (eq. 4); X* is `x`, the solution at `z`.

    Each of the `count` segments is swept once from the guess, the segments before it being solved.
    """
    problem = Problem.checked(block, z, context)
    problem.check_same_shape("x", x)
    with no_gradients(block):
        residuals = [
            block.update(start, z, run.start, run.stop, cache) - x[:, run]
            for run, start, cache in _each_segment(problem, x, guess, count)
        ]
    return torch.cat(residuals, dim=1)


def distances(
    block: Block, x: Float[Tensor, "b t c"], z: Float[Tensor, "b t c"], guess: Guess,
    context: Tensor | Context | None = None, count: int = 1,
) -> list[Float[Tensor, "k b"]]:  # fmt: skip
    """Measures the largest |X^(k) - X*| of each sample after k = 0, 1, ... plain sweeps of a segment's tokens.

    X* is `x`, the solution at `z`. Each of the `count` segments starts from the guess, those before it being solved
    (Figure 5 of the paper; one segment is Figure 2). It ends with a sweep that changes no entry by more than 1e-5:
    coming near X* is not enough, because an error may grow again before it dies. As many sweeps as the segment has
    tokens make it exact (Proposition 1). A token that overflows is set back to the guess; the distance after such a
    sweep is infinite.
    """
    problem = Problem.checked(block, z, context)
    problem.check_same_shape("x", x)
    curves = []
    with no_gradients(block):
        for run, start, cache in _each_segment(problem, x, guess, count):
            current = start.clone()
            curve = [_distance(current[:, run], x[:, run])]
            for front in range(run.start, run.stop):  # tokens before it are final, by Proposition 1
                rest = slice(front, run.stop)
                g = block.update(current, z, front, run.stop, cache)
                is_settled = float((g - current[:, rest]).abs().max()) <= _SETTLED
                curve.append(_distance(torch.cat((current[:, run.start : front], g), dim=1), x[:, run]))
                current[:, rest] = torch.where(torch.isfinite(g).all(dim=-1, keepdim=True), g, start[:, rest])
                if is_settled:
                    break
            curves.append(torch.stack(curve))
    return [curve.clone() for curve in curves]  # outside inference mode, ordinary tensors


def segment_runs(length: int, count: int) -> list[slice]:
    """The `count` runs of tokens of `Segments(count)`."""
    Segments(count).check(length)
    return [slice(k * length // count, (k + 1) * length // count) for k in range(count)]


def _each_segment(problem: Problem, x: Tensor, guess: Guess, count: int) -> Iterator[tuple[slice, Tensor, Any]]:
    """Each segment with its start, the guess after the solution of the segments before, and their cache."""
    block, z = problem.block, problem.z
    cache, start = block.init_cache(z, problem.context), guess(z)
    for run in segment_runs(z.shape[1], count):
        yield run, torch.cat((x[:, : run.start], start[:, run.start :]), dim=1), cache
        if run.stop < z.shape[1]:
            block.update(x, z, run.start, run.stop, cache)  # the keys of the solution, for the next segment


def _distance(x: Tensor, answer: Tensor) -> Float[Tensor, " b"]:
    return (x - answer).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).amax(dim=(1, 2))


def _reached(curve: Float[Tensor, " k"], tolerance: float) -> int | None:
    above = (curve > tolerance).nonzero()
    sweeps = int(above[-1]) + 1 if len(above) else 0
    return sweeps if sweeps < len(curve) else None


def gamma_products(
    block: Block, x: Float[Tensor, "b t c"], z: Float[Tensor, "b t c"], context: Tensor | Context | None = None
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Builds the maps v -> Gamma v and v -> Gamma^T v on (B, T, C), for Gamma = dg/dx at `x`, one matrix per sample.

    Gamma carries the error from sweep to sweep near a solution: e^(k+1) = Gamma e^(k) (eq. 6 of the paper, where the
    sign is in its gamma_ti). It is strictly lower triangular in the tokens.
    """
    problem = Problem.checked(block, z, context)
    problem.check_same_shape("x", x)
    # The other kernels of attention cannot be differentiated twice.
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        x, z = x.clone().requires_grad_(), z.clone()
        g, _ = Problem(block, z, problem.context).evaluate(x)
        g = g + 0 * x  # which has a graph even if g does not depend on x
        w = torch.zeros_like(g).requires_grad_()
        (pulled,) = torch.autograd.grad(g, x, w, create_graph=True)

    def product(v: Tensor) -> Tensor:  # the derivative of Gamma^T w, which is linear in w, along v
        return torch.autograd.grad(pulled, w, v, retain_graph=True)[0]

    def transposed_product(v: Tensor) -> Tensor:
        return torch.autograd.grad(g, x, v, retain_graph=True)[0]

    return product, transposed_product


def gamma_norm(
    block: Block, x: Float[Tensor, "b t c"], z: Float[Tensor, "b t c"], context: Tensor | Context | None = None,
    rtol: float = 1e-3,
) -> Float[Tensor, " b"]:  # fmt: skip
    """Computes the spectral norm of Gamma = dg/dx at `x`, per sample, by Golub-Kahan-Lanczos bidiagonalisation.

    k products with Gamma and k with Gamma^T give orthonormal vectors between which Gamma is a bidiagonal matrix of k
    rows. Its norm grows towards that of Gamma from below. The estimate stops once a row adds less than a share `rtol`
    of it for every sample, or after 100 rows.
    """
    product, transposed_product = gamma_products(block, x, z, context)
    start = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype).to(x.device)
    right, _ = _orthonormal(start, [])
    rights, lefts, diagonal, above = [right], list[Tensor](), list[Tensor](), list[Tensor]()
    norm = x.new_zeros(len(x))
    for _ in range(_MOST_ROWS):
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
    """`v` without its parts along the unit vectors of `basis`, scaled to length 1, and the length that was left."""
    for other in (*basis, *basis):  # the second time removes what rounding left
        v = v - (v * other).sum(dim=(1, 2), keepdim=True) * other
    length = v.norm(dim=(1, 2), keepdim=True)
    return v / length.clamp(min=torch.finfo(v.dtype).tiny), length.flatten()
