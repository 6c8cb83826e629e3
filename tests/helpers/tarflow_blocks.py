"""Blocks with the structure of a TarFlow block, whose `reverse` runs the whole network for every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TOKENS, CHANNELS = 6, 8


class Flip(nn.Module):
    def forward(self, x: Tensor, dim: int = 1, inverse: bool = False) -> Tensor:
        return x.flip(dim)


class Attention(nn.Module):
    num_heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, 3 * CHANNELS)
        self.proj = nn.Linear(CHANNELS, CHANNELS)
        self.scale, self.window = 0.5, TOKENS

    def forward(self, h: Tensor, temperature: float) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)) for part in self.qkv(self.norm(h)).chunk(3, dim=-1))
        logits = torch.einsum("bihd,bjhd->bhij", q, k) * self.scale / temperature
        past = torch.ones(h.shape[1], h.shape[1]).tril().triu(1 - self.window).bool()
        mixed = torch.einsum("bhij,bjhd->bihd", logits.masked_fill(~past, -torch.inf).softmax(-1), v)
        return self.proj(mixed.flatten(2))


class Perceptron(nn.Module):
    def __init__(self, dropout: float | None) -> None:
        super().__init__()
        drop = [] if dropout is None else [nn.Dropout(dropout)]
        self.norm = nn.LayerNorm(CHANNELS)
        self.main = nn.Sequential(nn.Linear(CHANNELS, 16), nn.GELU(), *drop, nn.Linear(16, CHANNELS))

    def forward(self, h: Tensor) -> Tensor:
        return self.main(self.norm(h))


class Layer(nn.Module):
    def __init__(self, dropout: float | None) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), Perceptron(dropout)

    def forward(self, h: Tensor, temperature: float) -> Tensor:
        h = h + self.attention(h, temperature)
        return h + self.mlp(h)


class Block(nn.Module):
    """The structure of a TarFlow block, with a `reverse` that runs the whole network for every token."""

    def __init__(self, classes: int = 0, dropout: float | None = None) -> None:
        super().__init__()
        self.proj_in, self.proj_out = nn.Linear(3, CHANNELS), nn.Linear(CHANNELS, 6)
        self.pos_embed = nn.Parameter(torch.randn(TOKENS, CHANNELS))
        self.class_embed = nn.Parameter(torch.randn(classes, 1, CHANNELS)) if classes else None
        self.attn_blocks = nn.ModuleList([Layer(dropout), Layer(dropout)])
        self.permutation = Flip()
        self.factor, self.settings = 1.0, {"factors": [1.0]}
        self.register_buffer("gain", torch.ones(1))

    def network(self, x: Tensor, y: Tensor | None, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        h = self.proj_in(x) + self.permutation(self.pos_embed, dim=0)[: x.shape[1]]
        if self.class_embed is not None:
            h = h + self.embedding(self.class_embed, y)
        for layer in self.attn_blocks:
            h = layer(h, temperature)
        log_scale, shift = self.proj_out(h).chunk(2, dim=-1)
        return log_scale, shift * self.factor * self.settings["factors"][0] * self.gain

    def embedding(self, rows: Tensor, y: Tensor | None) -> Tensor:
        return rows.mean(dim=0) if y is None else rows[y]

    def reverse(
        self, x: Tensor, y: Tensor | None = None, guidance: float = 0, guide_what: str = "ab", attn_temp: float = 1.0,
        annealed_guidance: bool = False,
    ) -> Any:  # fmt: skip
        x, log_det = self.permutation(x).clone(), torch.zeros(len(x))
        for i in range(x.shape[1] - 1):
            scale, shift = (out[:, i] for out in self.network(x, y))
            if guidance > 0:
                free_scale, free_shift = (out[:, i] for out in self.network(x, None, attn_temp))
                weight = guidance * ((i + 1) / (x.shape[1] - 1) if annealed_guidance else 1.0)
                scale = scale + weight * (scale - free_scale) if "a" in guide_what else scale
                shift = shift + weight * (shift - free_shift) if "b" in guide_what else shift
            x[:, i + 1] = x[:, i + 1] * scale.exp() + shift
            log_det = log_det + scale.sum(dim=-1)
        return self.result(self.permutation(x, inverse=True), log_det)

    def result(self, x: Tensor, log_det: Tensor) -> Any:
        return x


class Boltzmann(Block):
    """As SBG's: it returns the log-determinant too."""

    def result(self, x: Tensor, log_det: Tensor) -> Any:
        return x, log_det


class Conditioned(Block):
    """As autocast's: a condition for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.cond_proj = nn.Linear(5, CHANNELS)

    def reverse(self, x: Tensor, cond: Tensor) -> Any:  # type: ignore[override]
        x, cond = self.permutation(x).clone(), self.permutation(cond)
        for i in range(x.shape[1] - 1):
            h = self.proj_in(x) + self.permutation(self.pos_embed, dim=0)[: x.shape[1]] + self.cond_proj(cond)
            for layer in self.attn_blocks:
                h = layer(h, 1.0)
            scale, shift = self.proj_out(h)[:, i].chunk(2, dim=-1)
            x[:, i + 1] = x[:, i + 1] * scale.exp() + shift
        return self.permutation(x)


class PostNorm(Layer):
    def forward(self, h: Tensor, temperature: float) -> Tensor:
        return 0.5 * super().forward(h, temperature)


CASES: dict[str, tuple[type[Block], dict[str, Any], dict[str, Any]]] = {
    "plain": (Block, {}, {}),
    "classes": (Block, {"classes": 3}, {"y": torch.tensor([0, 2])}),
    "classes without labels": (Block, {"classes": 3}, {}),
    "guidance": (Block, {"classes": 3}, {"y": torch.tensor([0, 2]), "guidance": 0.7, "attn_temp": 1.3}),
    "annealed": (Block, {}, {"guidance": 0.7, "attn_temp": 0.5, "annealed_guidance": True, "guide_what": "b"}),
    "log-determinant": (Boltzmann, {"dropout": 0.1}, {}),
    "condition": (Conditioned, {}, {"cond": torch.randn(2, TOKENS, 5)}),
}


def make(name: str) -> Block:
    kind, sizes, _ = CASES[name]
    torch.manual_seed(0)
    block = kind(**sizes).eval().requires_grad_(False)
    block.proj_out.weight.mul_(0.3)
    return block


def close(a: Any, b: Any) -> bool:
    pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
    return all(torch.allclose(x, y, rtol=1e-5, atol=1e-5) for x, y in pairs)


def outcome(block: Any, arguments: dict[str, Any]) -> Any:
    """Returns the text of the result or the error of a call on 4 samples."""
    x = torch.randn(4, TOKENS, 3, generator=torch.Generator().manual_seed(0))
    try:
        return repr(block.reverse(**{"x": x, **arguments}).tolist())
    except Exception as error:
        return repr(error)
