"""The solve of one picture, recorded call by call for the page that plays it."""

from __future__ import annotations

import base64
import math
from typing import Any

import torch
from torch import Tensor

import jacobiflow as jf
from jacobiflow.data import quantize
from jacobiflow.fixed_point import solve_certified
from tools.pictures.front import Recorder

LABEL, SEED = 9, 0  # an ankle boot
SOLVER = jf.Solver(jf.Window(16), stopping=jf.Tolerance(3e-5))  # images are then within 1e-3 of the exact inverse's
SIZES = ("num_tokens", "token_channels", "image_size", "in_channels", "patch_size")
_MASK = 0xFFFFFFFF


def page_latents(flow: jf.TarFlow, seed: int) -> Tensor:
    """Returns the latents that page.js draws from a seed: numbers of mulberry32, made normal by Box and Muller."""
    state = seed

    def uniform() -> float:
        nonlocal state
        state = (state + 0x6D2B79F5) & _MASK
        t = ((state ^ (state >> 15)) * (1 | state)) & _MASK
        t ^= (t + (t ^ (t >> 7)) * (61 | t)) & _MASK
        return (t ^ (t >> 14)) / 2**32

    def normal() -> float:
        return math.sqrt(-2 * math.log(1 - uniform())) * math.cos(2 * math.pi * uniform())

    shape = (1, flow.config.num_tokens, flow.config.token_channels)
    return torch.tensor([normal() for _ in range(math.prod(shape))]).view(shape)


def record(flow: jf.TarFlow) -> dict[str, Any]:
    """Records the solve of a picture under the model's recommended settings, beside the exact loop.

    Returns:
        The content of recording.json. Each entry of `calls` is the block, the run of tokens that the network call
        evaluated, and the front after it. `pixels` has a byte for each number: the first tokens, the tokens of every
        run after its call, and the final picture; runs are in the causal order of their block.
    """
    guidance, labels, latents = flow.recommended.guidance, torch.tensor([LABEL]), page_latents(flow, SEED)
    blocks, length = flow.guided(guidance).inverse_blocks, flow.config.num_tokens
    calls: list[tuple[int, int, int, int]] = []
    residuals: list[float] = []
    prior = flow.prior_tokens(latents)
    runs = [prior[0]]

    def solve(i: int, z: Tensor) -> Tensor:
        recorder = Recorder(blocks[i])
        solution = solve_certified(recorder, z, SOLVER, labels)
        residuals.append(float(solution.residual))
        # A call on all tokens is a certificate: the front was at the end before it.
        fronts = [length if run == (0, length) else run[0] for run in recorder.runs[1:]]
        states = [*recorder.states[1:], solution.x]
        for (start, stop), front, state in zip(recorder.runs, [*fronts, length], states, strict=True):
            calls.append((i, start, stop, front))
            runs.append(state[0, start:stop])
        return solution.x

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # calls are small, and rounding does not depend on the machine's cores
    with torch.no_grad():
        images = flow.from_tokens(flow.map_blocks_reversed(prior, solve))
        images = jf.denoise(flow, images, labels, flow.recommended.denoise)
    exact = jf.sample(flow, latents=latents, labels=labels, strategy="sequential")
    torch.set_num_threads(threads)
    pixels = quantize(torch.cat([run.flatten() for run in (*runs, flow.to_tokens(images))]))
    return {
        "label": LABEL,
        "seed": SEED,
        **{name: getattr(flow.config, name) for name in SIZES},
        "orders": [block.permutation.order for block in flow.blocks],
        "calls": calls,
        "exact_calls": exact.network_calls,
        "residual": max(residuals),
        "difference": float((images - exact.images).abs().max()),
        "pixels": base64.b64encode(pixels.numpy().tobytes()).decode(),
    }
