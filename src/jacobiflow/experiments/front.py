"""How one block converges call by call, and the picture that the tokens make so far."""

from __future__ import annotations

from collections.abc import Mapping
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
from jacobiflow.guidance import Guidance, check_guidance, guided
from jacobiflow.inversion import invert, prior_tokens
from jacobiflow.solvers import Sequential, Solver, certify, solve

_LOOP = Solver(Sequential())
_MOST = 256  # states of a solve that are kept, and one: of longer sequences every second, third .. one
_ROWS = 64  # states whose pictures are made together


@dataclass(frozen=True)
class Course:
    """One solve of one block at one latent, state by state.

    **Attributes:**

    - `block`: its number in encoding order; `label`: the class, or `None`.
    - `after`: the numbers of network calls after which a state was kept: 0, each or every few, and all of them.
    - `states`: (K, T, C), the tokens then, in the block's causal order.
    - `runs`: the tokens [start, stop) that each call evaluated.
    - `images`: (K, c, h, w), what the remaining blocks, solved exactly, make of each state; denoised where asked.
    - `positions`: (T,), where in raster order each token of the block lies.
    - `tolerance`: of the solve; `certificate`: the largest |g(x) - x| of the last state, measured by one more pass.
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
    flow: ImageFlow, solvers: Mapping[str, Solver], block: int, latent: Float[Tensor, "t d"], label: int | None = None,
    guidance: Guidance | None = None, denoise: float = 0.0, tolerance: float = 1e-3,
) -> dict[str, Course]:  # fmt: skip
    """A `Course` by each of `solvers`, of `block` at the solution of the blocks that are sampled before it.

    Sequences of up to 256 tokens have a state kept for each call, longer ones for every second, third and so on.

    **Arguments:** `latent` (T, D) is standard normal, before the prior's scale; `label` its class, `None` for none. A
    token counts as settled within `tolerance`, and the solvers should stop on the same.

    **Raises** `ValueError` or `TypeError` where these do not fit the flow.
    """
    check_flow(flow)
    check_guidance(guidance)
    check_rate(flow, denoise)
    check_number("tolerance", tolerance)
    check_count("block", block, least=0, most=flow.config.num_blocks - 1)
    context = None if label is None else torch.tensor([label], device=flow.var.device)
    blocks = [guided(each, guidance) for each in flow.blocks]
    found: dict[str, Course] = {}

    def until(i: int, z: Tensor) -> Tensor:
        if i == block and not found:
            found.update({
                name: _course(flow, blocks, i, z, solver, context, denoise, tolerance)
                for name, solver in solvers.items()
            })  # fmt: skip
        return z if found else solve(blocks[i], z, _LOOP, context).x

    invert(flow, prior_tokens(flow, latent.unsqueeze(0)), until)
    return found


def _course(
    flow: ImageFlow, blocks: list[Any], i: int, z: Tensor, solver: Solver, context: Tensor | None, denoise: float,
    tolerance: float,
) -> Course:  # fmt: skip
    stride = -(-z.shape[1] // _MOST)
    recorder = _Recorder(blocks[i], stride)
    x = solve(recorder, z, solver, context).x
    states = torch.cat((*recorder.states, x))
    images = torch.cat([_images(flow, blocks, i, part, context, denoise) for part in states.split(_ROWS)])
    tokens = torch.arange(x.shape[1], device=x.device).view(1, -1, 1)
    return Course(
        i, None if context is None else int(context), (*range(0, len(recorder.runs), stride), len(recorder.runs)),
        states, tuple(recorder.runs), images,
        flow.blocks[i].permutation(tokens).flatten(), tolerance, float(certify(blocks[i], z, x, context)),
    )  # fmt: skip


def _images(flow: ImageFlow, blocks: list[Any], i: int, x: Tensor, context: Tensor | None, denoise: float) -> Tensor:
    """What the blocks below `i` make of its states `x`."""
    labels = None if context is None else context.expand(len(x))

    def rest(j: int, z: Tensor) -> Tensor:
        return x if j == i else z if j > i else solve(blocks[j], z, _LOOP, labels).x

    images = flow.to_images(invert(flow, x, rest))
    return denoised(flow, images, labels, denoise, _ROWS) if denoise else images
