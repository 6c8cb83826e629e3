"""Small random flows and hand-made blocks that are hard enough to test solvers on."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

import jacobiflow as jf


@dataclass(frozen=True)
class BlockProblem:
    """One block to invert at `z`: the library's block, the oracle's map, and that map's fixed point."""

    block: Any
    g: Callable[[Tensor], Tensor]
    z: Tensor
    labels: Tensor | None
    answer: Tensor

    @property
    def length(self) -> int:
        return self.z.shape[1]

    def residual(self, x: Tensor) -> Tensor:
        """Per sample."""
        return (self.g(x) - x).abs().amax(dim=(1, 2))

    def of(self, rows: slice) -> BlockProblem:
        """The same for some of the samples."""

        def g(x: Tensor) -> Tensor:
            full = self.answer.clone()
            full[rows] = x
            return self.g(full)[rows]

        labels = None if self.labels is None else self.labels[rows]
        return BlockProblem(self.block, g, self.z[rows], labels, self.answer[rows])


@cache
def make_flow(
    image_size: int = 8, patch_size: int = 2, in_channels: int = 1, num_classes: int = 0, nvp: bool = True,
    num_blocks: int = 2, seed: int = 0, noise_std: float = 0.0,
) -> jf.TarFlow:  # fmt: skip
    """A float64 TarFlow, not to be changed, in which every block needs more than T/4 sweeps from z.

    A fresh TarFlow is the identity. Here the output layers are redrawn, attention and embeddings are made to matter,
    and the prior of a volume-preserving flow has variances between 1/2 and 2.
    """
    config = jf.TarFlowConfig(
        in_channels, image_size, patch_size, width=32, num_blocks=num_blocks, layers_per_block=2,
        num_classes=num_classes, nvp=nvp, head_dim=16, expansion=2, noise_std=noise_std,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        flow = jf.TarFlow(config).double().eval()
        size = config.token_dim
        for block in flow.blocks:
            block.pos_embed.mul_(30)
            if block.class_embed is not None:
                block.class_embed.mul_(50)
            for layer in block.attn_blocks:
                layer.attention.qkv.weight.mul_(2)
                layer.attention.proj.weight.mul_(2)
            block.proj_out.weight.normal_(std=0.15 / size**0.25)
            if nvp:
                block.proj_out.weight[:size].normal_(std=0.03)
        if not nvp:
            flow.var.uniform_(0.5, 2)
    return flow


@cache
def make_maf(
    image_size: int = 4, in_channels: int = 1, hidden_features: int = 20, hidden_layers: int = 2, num_classes: int = 3,
    num_blocks: int = 2, seed: int = 0,
) -> jf.MAF:  # fmt: skip
    """A float64 MAF, not to be changed, whose every weight matters; a fresh one is the identity."""
    config = jf.MAFConfig(in_channels, image_size, hidden_features, num_blocks, hidden_layers, num_classes)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        flow = jf.MAF(config).double().eval()
        for block in flow.blocks:
            *hidden, last = block.layers
            for layer in hidden:
                layer.weight.mul_(2)
            last.weight.normal_(std=0.5)
            last.weight[0::2].mul_(0.3)
            last.bias.normal_(std=0.2)
            for layer in block.layers if config.num_classes else ():
                layer.class_embed.normal_(std=0.3)
        flow.var.uniform_(0.5, 2)
    return flow


@cache
def make_star(**size: Any) -> jf.STARFlow:
    """A float64 STARFlow, not to be changed, whose every weight matters."""
    config = jf.STARFlowConfig(1, 6, 2, 40, (1, 2), text_tokens=3, text_dim=5, head_dim=20, noise_std=0.2)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        flow = jf.STARFlow(replace(config, **size)).double().eval().requires_grad_(False)
        for block in flow.blocks:
            for name, parameter in block.named_parameters():
                if name.endswith("bias") or "norm" in name:
                    parameter.add_(0.2 * torch.randn_like(parameter))
            block.proj_out.weight.normal_(std=0.1)
        flow.blocks[-1].null_text.normal_()
    return flow


def texts(flow: jf.STARFlow, num: int) -> Tensor:
    """States of texts in float64."""
    shape = (num, flow.config.text_tokens, flow.config.text_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(num), dtype=torch.float64)


def latents(flow: jf.TarFlow, num: int, seed: int = 0) -> Tensor:
    """Standard normal latents in the flow's dtype."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num, flow.config.num_tokens, flow.config.token_dim)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(flow.var.dtype)


def to_float32(flow: jf.TarFlow) -> jf.TarFlow:
    """A float32 copy."""
    return deepcopy(flow).float()


def make_identity(dtype: torch.dtype) -> jf.TarFlow:
    """A TarFlow of 16 tokens and 2 blocks whose blocks are the identity, with a prior of variance 1/2."""
    flow = jf.TarFlow(jf.TarFlowConfig(1, 8, 2, 32, 2, 1, head_dim=16)).eval().requires_grad_(False)
    for block in flow.blocks:
        block.proj_out.weight.zero_()
        block.proj_out.bias.zero_()
    flow.var.fill_(0.5)
    return flow.to(dtype)
