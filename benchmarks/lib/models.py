"""Flows with random weights, and latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import jacobiflow as jf
from jacobiflow.models.flow import Flow
from jacobiflow.models.latents import draw_latents


def latents(flow: Flow, batch: int, seed: int = 1, prompts: Sequence[str] = ()) -> tuple[Tensor, Any]:
    """Latents of a batch and their context, the same each time: `prompts` if the flow reads text, classes, or None."""
    z = draw_latents(batch, flow.config.num_tokens, flow.config.token_dim, seed)
    if isinstance(flow, jf.STARFlow):
        return z, [prompts[i % len(prompts)] for i in range(batch)]
    return z, torch.arange(batch) % flow.config.num_classes if flow.config.num_classes else None


def random_flow(config: jf.TarFlowConfig | jf.TokenConfig) -> jf.TarFlow:
    """A flow with random weights. The last layers, zero in a new flow, are small enough that nothing grows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = jf.TarFlow(config).eval().requires_grad_(False)
        for block in flow.blocks:
            block.proj_out.weight.normal_(std=0.1 * block.proj_out.in_features**-0.5)
    return flow


def random_starflow(config: jf.STARFlowConfig, dtype: str) -> jf.STARFlow:
    """A STARFlow with random weights whose outputs are small. It never has weights of another dtype in memory."""
    with torch.device("meta"):
        flow = jf.STARFlow(config).eval().requires_grad_(False).to(getattr(torch, dtype))
    flow.to_empty(device="cpu")
    torch.manual_seed(0)
    for name, values in flow.state_dict().items():
        values.normal_(std=values.shape[-1] ** -0.5) if values.ndim > 1 else values.fill_("norm.weight" in name)
    flow.var.fill_(1)
    for block in flow.blocks:
        block.final_norm.weight.zero_()
        block.proj_out.weight.mul_(0.3)
    flow.blocks[-1].null_text.mul_(0.1)
    return flow


def sample(flow: Flow, strategy: str | jf.Strategy, z: Tensor, context: Any, certify: bool = False) -> jf.Samples:
    """Samples of given latents under the guidance of the flow, without denoising."""
    return jf.sample(flow, latents=z, context=context, settings=None, strategy=strategy, certify=certify)
