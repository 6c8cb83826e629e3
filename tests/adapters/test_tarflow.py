"""Live TarFlow modules: accelerated blocks return what their own `reverse` does, or are left alone by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacobiflow as jf

pytestmark = pytest.mark.usefixtures("one_thread")
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

    def forward(self, h: Tensor, temperature: float) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)) for part in self.qkv(self.norm(h)).chunk(3, dim=-1))
        logits = torch.einsum("bihd,bjhd->bhij", q, k) / 2 / temperature
        past = torch.ones(h.shape[1], h.shape[1]).tril().bool()
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

    def network(self, x: Tensor, y: Tensor | None, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        h = self.proj_in(x) + self.permutation(self.pos_embed, dim=0)[: x.shape[1]]
        if self.class_embed is not None:
            h = h + (self.class_embed.mean(dim=0) if y is None else self.class_embed[y])
        for layer in self.attn_blocks:
            h = layer(h, temperature)
        log_scale, shift = self.proj_out(h).chunk(2, dim=-1)
        return log_scale, shift

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


@pytest.mark.parametrize("name", CASES)
def test_reverse_returns_what_it_did(name: str) -> None:
    block, arguments, x = make(name), CASES[name][2], torch.randn(2, TOKENS, 3)
    kind, before = type(block), copy.deepcopy(block.state_dict())
    want = block.reverse(x, **arguments)
    with jf.accelerate(nn.ModuleList([block])) as handle:
        assert isinstance(block, kind) and type(block) is not kind
        assert close(block.reverse(x, **arguments), want) and handle.ways == {"0": "native"}
        assert close(copy.deepcopy(block).reverse(x, **arguments), want)
        for parameter in block.parameters():
            parameter.mul_(0.9)  # a training step
        changed = block.reverse(x, **arguments)
        block.load_state_dict(before)
        assert close(block.reverse(x, **arguments), want) and not close(changed, want)
    assert type(block) is kind


def test_what_native_code_cannot_do_is_the_block_s_own() -> None:
    block, x = make("log-determinant"), torch.randn(2, TOKENS, 3)
    with jf.accelerate(block) as handle:
        own = make("log-determinant")
        wide = x.clone()
        wide[0] = 3e38  # this row overflows
        for ours, theirs in zip(block.reverse(wide), own.reverse(wide), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)
        block.train()
        block.reverse(x)  # with dropout
        block.eval().requires_grad_(True)
        with torch.enable_grad():
            assert block.reverse(x)[0].requires_grad
        assert handle.ways == {"": "library"}
        with pytest.raises(TypeError, match="reverse"):
            block.reverse(x, colour=3)


def test_a_block_that_differs_is_left_alone_by_name() -> None:
    other_layer, other_part, other_call = make("plain"), make("plain"), make("plain")
    other_layer.attn_blocks[1].__class__ = PostNorm
    other_part.attn_blocks[0].mlp.main[1] = nn.SiLU()
    other_call.reverse = lambda x: x  # type: ignore[method-assign, assignment]
    stack = nn.ModuleList([make("plain"), other_layer, other_part, other_call])
    handle = jf.accelerate(stack)
    assert list(handle.transforms) == ["0"]
    assert handle.untouched == {
        "1": "its reverse computes something else than that of a TarFlow block",
        "2": "attn_blocks.0.mlp.main.1 is not that of a TarFlow block",
        "3": "its reverse was replaced",
    }
    with pytest.raises(ValueError, match=r"0: attn_blocks\.0\.mlp\.main\.1 is not .* nothing was changed"):
        jf.accelerate(nn.ModuleList([other_part]))
