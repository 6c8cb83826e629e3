"""Blocks with the oracle's maps, and a flow with closed forms, for the tests of calibration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import jacobiflow as jf
from jacobiflow.blocks.guidance import guided
from tests.helpers import oracle
from tests.helpers.problems import BlockProblem, latents, make_flow, make_maf


def randn(*shape: int, seed: int = 9) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def oracle_of(flow: Any, guidance: jf.Guidance | None) -> tuple[oracle.FlowOracle, oracle.Guide | None]:
    guide = guidance and oracle.Guide(guidance.weight, guidance.annealed, guidance.on, guidance.attn_temperature)
    return oracle.MAFOracle(flow) if isinstance(flow, jf.MAF) else oracle.Oracle(flow), guide


def way_back(
    flow: Any, tokens: Tensor, labels: Tensor | None, guidance: jf.Guidance | None = None
) -> list[BlockProblem]:
    """Returns the blocks in encoding order, each with the z and the solution on the way from tokens to an image."""
    (reference, guide), problems = oracle_of(flow, guidance), []
    for i in reversed(range(flow.config.num_blocks)):
        z = reference.flip(i, tokens)

        def g(x: Tensor, i: int = i, z: Tensor = z) -> Tensor:
            return reference.g(i, x, z, labels, guide)

        block, answer = guided(flow.blocks[i], guidance), oracle.sequential(g, z)
        problems.append(BlockProblem(block, g, z.to(flow.var), labels, answer))
        tokens = reference.flip(i, answer)
    return problems[::-1]


PROBLEMS: dict[str, tuple[Callable[[], Any], int, jf.Guidance | None]] = {
    "classes": (lambda: make_flow(num_classes=3), 0, None),
    "guided": (lambda: make_flow(image_size=6, num_classes=2), 0, jf.Guidance(1.2, True, "both", 0.7)),
    "MAF": (make_maf, 1, None),
}


def problem(name: str) -> BlockProblem:
    """A block of a small flow at three random latents."""
    make, i, guidance = PROBLEMS[name]
    flow = make()
    labels = torch.tensor([0, -1, 1]) if flow.config.num_classes else None
    return way_back(flow, latents(flow, 3, seed=5) * flow.var.sqrt(), labels, guidance)[i]


def runs_of(length: int, count: int) -> list[slice]:
    return [slice(k * length // count, (k + 1) * length // count) for k in range(count)]


def errors_of(g: oracle.Map, answer: Tensor, guess: Tensor, run: slice, sweeps: int | None = None) -> Tensor:
    """Returns X^(k) - X* of a run of tokens after k = 0, 1, ... sweeps; the tokens before it are solved."""
    x = torch.cat((answer[:, : run.start], guess[:, run.start :]), dim=1)
    errors = [(x - answer)[:, run]]
    for _ in range(run.stop - run.start if sweeps is None else sweeps):
        x[:, run] = g(x)[:, run]
        errors.append((x - answer)[:, run])
    return torch.stack(errors)


def dense_gamma(g: oracle.Map, x: Tensor) -> np.ndarray:
    """dg/dx at each sample of `x`, (B, TC, TC), by automatic differentiation of the oracle's map."""
    jacobian: Any = torch.autograd.functional.jacobian(g, x)
    size = x[0].numel()
    return np.stack([jacobian[n, :, :, n].reshape(size, size).numpy() for n in range(len(x))])


def linear_flow(slopes: list[float], log_scale: float = 0.0, num_classes: int = 0, nvp: bool = True) -> jf.TarFlow:
    """Blocks x_t = exp(log_scale) z_t + slope x_{t-1} on 9 tokens of one number; |W_u| = slope, |W_s| = log_scale.

    All layers are the identity. Channel 0 of the hidden state is the token, channel 1 is 1.
    """
    config = jf.TarFlowConfig(1, 3, 1, 16, len(slopes), 1, num_classes=num_classes, nvp=nvp, head_dim=16, expansion=1)
    flow = jf.TarFlow(config).double().eval()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.zero_()
        for block, slope in zip(flow.blocks, slopes, strict=True):
            block.proj_in.weight[0, 0] = block.proj_in.bias[1] = 1
            block.proj_out.weight[-1, 0] = slope
            if nvp:
                block.proj_out.weight[0, 1] = log_scale
    return flow
