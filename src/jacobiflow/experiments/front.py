"""How one block converges call by call, and the picture that the tokens make so far."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jacobiflow.checks import check_count, check_number
from jacobiflow.denoising import check_rate, denoised
from jacobiflow.flows.base import Block
from jacobiflow.flows.image_flow import ImageFlow, check_flow
from jacobiflow.flows.labels import Labels
from jacobiflow.guidance import Guidance, check_guidance, guided
from jacobiflow.inversion import invert, prior_tokens
from jacobiflow.solvers import Sequential, Solution, Solver, Tolerance, Whole, Window, solve, solve_certified

_LOOP = Solver(Sequential())
_MOST = 256  # states of a solve that are kept, and one: of longer sequences every second, third .. one
_ROWS = 64  # states whose pictures are made together


@dataclass(frozen=True)
class Trajectory:
    """One solve of one block at one latent, state by state.

    **Attributes:**

    - `block`: its number in encoding order; `label`: the class, or `None`.
    - `after`: the numbers of network calls after which a state was kept: 0, each or every few, and all of them.
    - `states`: (K, T, C), the tokens then, in the block's causal order.
    - `runs`: the tokens [start, stop) that each call evaluated.
    - `images`: (K, c, h, w), what the remaining blocks, solved exactly, make of each state; denoised where asked.
    - `positions`: (T,), where in raster order each token of the block lies.
    - `tolerance`: of the solve; `certificate`: the largest |g(x) - x| of the last state, 0 where it is exact by
      construction.
    """

    block: int
    label: int | None
    after: tuple[int, ...]
    states: Float[Tensor, "k t c"]
    runs: tuple[tuple[int, int], ...]
    images: Float[Tensor, "k n h w"]
    positions: Int[Tensor, " t"]
    tolerance: float
    certificate: float

    @property
    def calls(self) -> int:
        """Network calls."""
        return len(self.runs)

    @property
    def token_evaluations(self) -> int:
        """Tokens over these calls."""
        return sum(stop - start for start, stop in self.runs)

    @cached_property
    def settled(self) -> Bool[Tensor, "k t"]:
        """Which tokens stay within the tolerance of where they end, from each kept state on."""
        away = (self.states - self.states[-1]).abs().amax(dim=2) > self.tolerance
        return ~away.flip(0).cummax(dim=0).values.flip(0)


class _Recorder:
    """A block that keeps what every `stride`-th call read, and which tokens each evaluated."""

    def __init__(self, block: Block, stride: int) -> None:
        self._block, self._stride = block, stride
        self.states: list[Tensor] = []
        self.runs: list[tuple[int, int]] = []

    def init_cache(self, z: Tensor, context: Tensor | None = None) -> Any:
        """The block's own cache."""
        return self._block.init_cache(z, context)

    def update(self, x: Tensor, z: Tensor, start: int, stop: int, cache: Any) -> Tensor:
        """The block's own map."""
        if len(self.runs) % self._stride == 0:
            self.states.append(x.clone())
        self.runs.append((start, stop))
        return self._block.update(x, z, start, stop, cache)


def record(
    flow: ImageFlow, block: int, latents: Float[Tensor, "n t d"], labels: Labels | None = None,
    guidance: Guidance | None = None, denoise: float = 0.0, tolerance: float = 1e-3, window: int | None = None,
) -> dict[str, Trajectory]:  # fmt: skip
    """A `Trajectory` of `block` token by token, by a window and by Jacobi iteration.

    The block is solved at the solution of those that are sampled before it, for that one of the `latents` whose number
    of Jacobi sweeps is the median. The latter two are swept to half the tolerance, and certified to it; the passes that
    certify count as calls.
    Sequences of up to 256 tokens have a state kept for each call, longer ones for every second, third and so on.

    **Arguments:**

    - `latents`, `labels`: as in `jacobiflow.sample`.
    - `guidance`, `denoise`: of the pictures, as there.
    - `tolerance`: largest residual, and how near to its end a token counts as settled.
    - `window`: tokens in the window, a sixth of all by default.

    **Returns** the trajectories by the names of their strategies.

    **Raises** `ValueError` or `TypeError` where these do not fit the flow.
    """
    check_flow(flow)
    check_guidance(guidance)
    denoise, tolerance = check_rate(flow, denoise), check_number("tolerance", tolerance)
    block = check_count("block", block, least=0, most=flow.config.num_blocks - 1)
    stopping = Tolerance(tolerance / 2)  # at the tolerance itself a certificate often misses it, see `solve_certified`
    window = max(flow.config.num_tokens // 6, 2) if window is None else window
    solvers = {
        "sequential": _LOOP,
        f"window:{window}": Solver(Window(window), stopping=stopping),
        "jacobi": Solver(Whole(), stopping=stopping),
    }
    if labels is not None:
        labels = flow.check_labels(labels, len(latents)).to(flow.var.device)
    blocks = [guided(each, guidance) for each in flow.blocks]
    stride = -(-flow.config.num_tokens // _MOST)
    rows, solved = labels, dict[str, tuple[_Recorder, Solution]]()  # labels of the rows that are solved now

    def solve_block(i: int, z: Tensor) -> Tensor:
        """The solution; at `block`, every state on the way there, which the remaining blocks take further."""
        nonlocal rows
        if i != block:
            return solve(blocks[i], z, _LOOP, rows, slots=_ROWS).x
        order = solve(blocks[i], z, solvers["jacobi"], rows).sample_sweeps.argsort(stable=True)
        median = order[len(z) // 2].view(1).to(z.device)
        rows = None if rows is None else rows[median]
        for name, solver in solvers.items():
            recorder = _Recorder(blocks[i], stride)
            solved[name] = recorder, solve_certified(recorder, z[median], solver, rows, tolerance=tolerance)
            recorder.states.append(solved[name][1].x)
        states = torch.cat([state for recorder, _ in solved.values() for state in recorder.states])
        rows = None if rows is None else rows.expand(len(states))
        return states

    images = flow.to_images(invert(flow, prior_tokens(flow, latents), solve_block))
    images = denoised(flow, images, rows, denoise, _ROWS) if denoise else images
    tokens = torch.arange(flow.config.num_tokens, device=flow.var.device).view(1, -1, 1)
    positions = flow.blocks[block].permutation(tokens).flatten()
    parts = images.split([len(recorder.states) for recorder, _ in solved.values()])
    return {
        name: Trajectory(
            block, None if rows is None else int(rows[0]),
            (*range(0, len(recorder.runs), stride), len(recorder.runs)), torch.cat(recorder.states),
            tuple(recorder.runs), part, positions, tolerance, float(solution.residual),
        )
        for (name, (recorder, solution)), part in zip(solved.items(), parts, strict=True)
    }  # fmt: skip
