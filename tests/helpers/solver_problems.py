"""Maps to solve, as blocks that watch what a solver does with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import jacobiflow as jf
from jacobiflow.blocks.base import AttentionBlock
from jacobiflow.blocks.context import NO_CONTEXT
from jacobiflow.blocks.guidance import guided
from jacobiflow.fixed_point.attempt import attempt as attempt_once
from jacobiflow.fixed_point.options import DEFAULT_TOLERANCE, SolveOptions
from jacobiflow.fixed_point.problem import Problem
from tests.helpers.oracle import Guide, Oracle, sequential
from tests.helpers.problems import BlockProblem, latents, make_flow

Map = Callable[[Tensor, Tensor, Any], Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(x: Tensor, answer: Tensor) -> float:
    assert x.shape == answer.shape
    return float((x - answer).abs().max()) if x.numel() else 0.0


def attempt(
    block: Any, z: Tensor, solver: jf.Solver, context: Tensor | None = None, *,
    tolerance: float | None = DEFAULT_TOLERANCE, batch_size: int | None = None,
) -> jf.Solution:  # fmt: skip
    """The first attempt of `jf.solve`, which leaves samples that fall short as they are."""
    options = SolveOptions(tolerance, certify=False, batch_size=batch_size)
    return attempt_once(Problem.checked(block, z, context), solver, options)


class Watched:
    """A map g(x, z, context) of whole sequences as a block whose cache is the tokens that it was fed.

    With `keys` it reads those, stale or not, and fails where one is staler than `slack`; else the present tokens.
    `calls` has the start, the stop and the samples of every call.
    """

    def __init__(self, g: Map, keys: bool = True, slack: float = math.inf) -> None:
        self.g, self.keys, self.slack = g, keys, slack
        self.calls: list[tuple[Any, int, int]] = []

    def init_cache(self, z: Tensor, context: jf.Context = NO_CONTEXT) -> Any:
        return SimpleNamespace(fed=torch.full_like(z, torch.nan), context=context.values)

    def update(self, x: Tensor, z: Tensor, start: int, stop: int, cache: Any) -> Tensor:
        assert 0 <= start < stop <= z.shape[1], f"entries {start} to {stop}"
        self.calls.append((start, stop, len(x)))
        return self._read(x, z, torch.full((len(x),), start), stop - start, cache)

    def _read(self, x: Tensor, z: Tensor, start: Tensor, size: int, cache: Any) -> Tensor:
        for n, first in enumerate(start.tolist()):
            before, after = max(first - 1, 0), first + size - 1
            fed, now = cache.fed[n, :before], x[n, :before]
            stale = ~((fed - now).abs() <= self.slack) & (fed != now)  # true where it was never fed
            assert not stale.any(), f"stale keys before token {before} of sample {n}"
            cache.fed[n, before:after] = x[n, before:after]
        read = torch.where(cache.fed.isnan(), 0, cache.fed) if self.keys else x
        g = self.g(read, z, cache.context)
        return torch.stack([row[first : first + size] for row, first in zip(g, start.tolist(), strict=True)])


class WatchedFronts(Watched, AttentionBlock):
    """With a front per sample. The map need not be affine, so solvers call `update_at` only."""

    affine_at = to_bf16 = None  # type: ignore[assignment]

    def update_at(self, x: Tensor, z: Tensor, start: Tensor, size: int, end: int, cache: Any) -> Tensor:
        assert start.min() >= 0
        assert start.max() + size == end <= z.shape[1]
        self.calls.append((start.tolist(), end, len(x)))
        return self._read(x, z, start, size, cache)

    def move_rows(self, cache: Any, source: Tensor, target: Tensor, num: int) -> Any:
        for rows in filter(lambda rows: rows is not None, (cache.fed, cache.context)):
            rows[target] = rows[source]
        return SimpleNamespace(fed=cache.fed[:num], context=None if cache.context is None else cache.context[:num])

    def reset_rows(self, cache: Any, rows: Tensor, context: jf.Context = NO_CONTEXT) -> None:
        cache.fed[rows] = torch.nan
        if context.values is not None:
            cache.context[rows] = context.values


def problem_of(g: Map, z: Tensor, context: Tensor | None = None, fronts: bool = False, **watch: Any) -> BlockProblem:
    block = (WatchedFronts if fronts else Watched)(g, **watch)
    return BlockProblem(block, lambda x: g(x, z, context), z, context, sequential(lambda x: g(x, z, context), z))


def echo(x: Tensor, z: Tensor, strength: Tensor) -> Tensor:
    """x_t = z_t + strength (0.1 + sin(sum over s < t of 0.8^(t-s-1) x_s)), a strength per sample: x_1 is not z_1."""
    age = torch.arange(x.shape[1]).view(-1, 1) - torch.arange(x.shape[1]) - 1
    heard = torch.where(age >= 0, 0.8 ** age.clamp(min=0).double(), 0.0)
    return z + strength.view(-1, 1, 1) * (0.1 + (heard @ x).sin())


STRENGTHS = torch.tensor([0.1, 1.5, 0.5, 0.9, 0.0, 1.2, 0.3], dtype=torch.float64)


def echoes(fronts: bool = True, num: int = 7, length: int = 24, **watch: Any) -> BlockProblem:
    """Up to seven samples that need from 1 to 21 sweeps."""
    return problem_of(echo, normal(num, length, 2, seed=2), STRENGTHS[:num], fronts, **watch)


def steep(x: Tensor, z: Tensor, kind: Tensor) -> Tensor:
    """A map for each kind of sample. 0: `echo` with a strength of 0.9.

    1: the answer is 1 everywhere; entries grow as exp(40 distance) of earlier tokens from it, and sweeps from z
    overflow. 2: the exact inverse is infinite from token 4 on.
    """
    kind, g = kind.view(-1, 1, 1), echo(x, z, torch.full((len(z),), 0.9, dtype=torch.float64))
    distance = 40 * (x - 1).abs().sum(dim=2, keepdim=True).cumsum(dim=1).roll(1, dims=1)
    distance[:, 0] = 0
    lost = (torch.arange(x.shape[1]) >= 4).view(1, -1, 1) & (kind == 2)
    return torch.where(kind == 1, distance.exp() * (z - 1), torch.where(lost, torch.inf, g))


def steep_problem(kinds: list[int], fronts: bool = False) -> BlockProblem:
    kind = torch.tensor(kinds, dtype=torch.float64)
    z = torch.where(kind.view(-1, 1, 1) == 1, 2.0, normal(len(kinds), 17, 2))
    problem = problem_of(steep, z, kind, fronts)
    assert (problem.answer[kind == 1] == 1).all()
    assert not problem.g(problem.g(z))[kind > 0].isfinite().all()
    return problem


OVERFLOWING = [
    (jf.Solver(jf.Whole()), 1e-9), (jf.Solver(jf.Whole(), stopping=jf.Stopping(3)), None),
    (jf.Solver(jf.Segments(3)), 1e-9), (jf.Solver(jf.Segments(3), jf.Zeros(), jf.Stopping(3)), None),
    (jf.Solver(jf.Window(6), jf.Zeros()), 1e-9), (jf.Solver(jf.Window(6), stopping=jf.Stopping(2)), 1e-9),
]  # fmt: skip


FLOWS: dict[str, tuple[dict[str, Any], Guide | None]] = {
    "nvp 25x4": ({"image_size": 10, "patch_size": 2}, None),
    "vp 16x1": ({"image_size": 4, "patch_size": 1, "nvp": False}, None),
    "nvp 9x4, guided": (
        {"image_size": 6, "patch_size": 2, "num_classes": 3},
        Guide(1.0, annealed=True, on="both", temperature=0.7),
    ),
}


@cache
def flow_problem(name: str, i: int = 1) -> BlockProblem:
    """Block `i` of a TarFlow, at three samples: of two classes and of none, where it has classes."""
    config, guide = FLOWS[name]
    flow = make_flow(**config)
    reference, z = Oracle(flow), latents(flow, 3, seed=i)
    labels = torch.tensor([0, 2, -1]) if flow.config.num_classes else None
    block: Any = flow.blocks[i]
    if guide is not None:
        on: Any = guide.on
        block = guided(block, jf.Guidance(guide.weight, guide.annealed, on, guide.temperature))

    def g(x: Tensor) -> Tensor:
        return reference.g(i, x, z, labels, guide)

    return BlockProblem(block, g, z, labels, sequential(g, z))
