"""Live TarFlow modules: accelerated blocks return what their own `reverse` does, or are left alone by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacobiflow as jf
from jacobiflow.native import SWITCH

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS, CHANNELS = 14, 8


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


@pytest.mark.parametrize("name", CASES)
def test_reverse_returns_what_it_did(name: str) -> None:
    block, arguments, x = make(name), CASES[name][2], torch.randn(2, TOKENS, 3)
    kind, before = type(block), copy.deepcopy(block.state_dict())
    want = block.reverse(x, **arguments)
    with jf.accelerate(nn.ModuleList([block])) as handle:
        assert isinstance(block, kind) and type(block) is not kind
        assert close(block.reverse(x, **arguments), want) and handle.backends == {"0": "native"}
        assert close(copy.deepcopy(block).reverse(x, **arguments), want)
        for parameter in block.parameters():
            parameter.mul_(0.9)  # a training step
        changed = block.reverse(x, **arguments)
        block.load_state_dict(before)
        assert close(block.reverse(x, **arguments), want) and not close(changed, want)
        assert handle.backends == {"0": "native"}
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
        assert handle.backends == {"": "library"}
        with pytest.raises(TypeError, match="reverse"):
            block.reverse(x, colour=3)


class Clamped(Block):
    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def network(self, x: Tensor, y: Tensor | None, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        log_scale, shift = super().network(x, y, temperature)
        return log_scale.clamp(-self.limit, self.limit), shift


class Windowed(Block):
    def __init__(self) -> None:
        super().__init__()
        for layer in self.attn_blocks:
            layer.attention.window = 6


class OtherAfterTheFifth(Block):
    def network(self, x: Tensor, y: Tensor | None, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        log_scale, shift = super().network(x, y, temperature)
        return log_scale, torch.cat((shift[:, :5], shift[:, 5:] + 0.1), dim=1)


class OneClassIsNone(Block):
    def embedding(self, rows: Tensor, y: Tensor | None) -> Tensor:
        return super().embedding(rows, None if y is None or len(y.unique()) == 1 else y)


class ClippedGuidance(Block):
    def reverse(self, x: Tensor, y: Tensor | None = None, guidance: float = 0) -> Any:  # type: ignore[override]
        return super().reverse(x, y, min(guidance, 4.0))


class AlwaysTempered(Block):
    def reverse(self, x: Tensor, y: Tensor | None = None, attn_temp: float = 1.0) -> Any:  # type: ignore[override]
        self.attn_blocks[0].attention.scale = 0.5 / attn_temp
        return super().reverse(x, y)


class MeanLogDet(Boltzmann):
    def result(self, x: Tensor, log_det: Tensor) -> Any:
        return x, log_det / TOKENS


class ThreeResults(Boltzmann):
    def result(self, x: Tensor, log_det: Tensor) -> Any:
        return x, log_det, 2 * x


FORKS: dict[str, tuple[type[Block], dict[str, Any]]] = {
    "log-scales up to 0.5": (Clamped, {"limit": 0.5}),
    "log-scales up to 1": (Clamped, {"limit": 1.0}),
    "log-scales up to 3": (Clamped, {"limit": 3.0}),
    "a window of 6 tokens": (Windowed, {}),
    "positions after the fifth": (OtherAfterTheFifth, {}),
    "equal labels": (OneClassIsNone, {"classes": 3}),
    "guidance up to 4": (ClippedGuidance, {"classes": 3}),
    "attention temperature without guidance": (AlwaysTempered, {}),
    "another log-determinant": (MeanLogDet, {}),
    "three results": (ThreeResults, {}),
}


@contextmanager
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "default dtype": double,
    "default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize(
    ("name", "surroundings"),
    [*((name, "as usual") for name in FORKS), *(("a window of 6 tokens", name) for name in SURROUNDINGS)],
)
def test_a_fork_that_computes_something_else_is_left_alone(name: str, surroundings: str) -> None:
    kind, sizes = FORKS[name]
    torch.manual_seed(0)
    flow, state = nn.ModuleList([make("classes"), kind(**sizes)]), torch.get_rng_state()
    with SURROUNDINGS.get(surroundings, nullcontext)():
        handle = jf.accelerate(flow)
    assert list(handle.transforms) == ["0"]
    assert handle.untouched == {"1": "its reverse computes something else than that of a TarFlow block"}
    assert torch.equal(torch.get_rng_state(), state)


def test_without_native_code_a_block_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    with pytest.raises(ValueError, match=f"0: native code is off, by {SWITCH}=0; nothing was changed"):
        jf.accelerate(nn.ModuleList([make("plain")]))


class UnconditionalBelowZero(Block):
    def embedding(self, rows: Tensor, y: Tensor | None) -> Tensor:
        embedding = super().embedding(rows, y)
        return (
            embedding if y is None else torch.where(torch.as_tensor(y).view(-1, 1, 1) < 0, rows.mean(dim=0), embedding)
        )


def outcome(block: Any, arguments: dict[str, Any]) -> Any:
    """What a call on 4 samples returns or raises."""
    x = torch.randn(4, TOKENS, 3, generator=torch.Generator().manual_seed(0))
    try:
        return repr(block.reverse(**{"x": x, **arguments}).tolist())
    except Exception as error:
        return repr(error)


CALLS: dict[str, dict[str, Any]] = {
    "number": {"y": 0},
    "tensor of a number": {"y": torch.tensor(0)},
    "too few labels": {"y": torch.tensor([0, 1])},
    "too many labels": {"y": torch.arange(5) % 3},
    "labels of two dimensions": {"y": torch.tensor([[0], [1], [2], [0]])},
    "label below 0": {"y": torch.tensor([0, -1, 2, 1])},
    "label out of range": {"y": torch.tensor([0, 1, 2, 3])},
    "labels that are no integers": {"y": torch.tensor([0.0, 1.0, 2.0, 0.0])},
    "mask": {"y": torch.tensor([True, False, True])},
    "list": {"y": [0, 1, 2, 0]},
    "x of two dimensions": {"x": torch.zeros(TOKENS, 3)},
    "x of other width": {"x": torch.zeros(4, TOKENS, 2)},
    "x of other dtype": {"x": torch.zeros(4, TOKENS, 3, dtype=torch.float64)},
    "too many tokens": {"x": torch.zeros(4, TOKENS + 1, 3)},
    "no samples": {"x": torch.zeros(0, TOKENS, 3)},
    "guidance below 0": {"guidance": -1.0},
    "large guidance": {"y": torch.tensor([0, 1, 2, 1]), "guidance": 30.0},
    "guidance in a tensor": {"y": torch.tensor([0, 1, 2, 1]), "guidance": torch.tensor(0.5)},
    "guidance of text": {"guidance": "1"},
    "guidance of scale": {"y": torch.tensor([0, 1, 2, 1]), "guidance": 0.5, "guide_what": "scale"},
    "guidance of nothing": {"y": torch.tensor([0, 1, 2, 1]), "guidance": 0.5, "guide_what": ""},
    "guidance of None": {"guidance": 0.5, "guide_what": None},
    "low temperature": {"guidance": 0.5, "attn_temp": 0.01},
    "annealed by a number": {"guidance": 0.5, "annealed_guidance": 1},
    "unknown argument": {"colour": 3},
}


@cache
def accelerated(kind: type[Block], **sizes: Any) -> tuple[Block, jf.Acceleration, Block]:
    """A block, its handle, and a copy of the block as it was."""
    torch.manual_seed(0)
    block = kind(**sizes).eval().requires_grad_(False)
    return block, jf.accelerate(block), copy.deepcopy(block)


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_was_not_tried_is_the_block_s_own(call: str) -> None:
    block, handle, own = accelerated(UnconditionalBelowZero, classes=3)
    assert outcome(block, CALLS[call]) == outcome(own, CALLS[call])
    assert handle.backends == {"": "library"}
    assert outcome(block, {"y": torch.tensor([2, 0, 1, 2])}) and handle.backends == {"": "native"}


@pytest.mark.parametrize("shape", [None, (14, 5), (4, 14, 4), (3, 14, 5), (4, 13, 5), (1, 14, 5)])
def test_a_condition_of_another_shape_is_the_block_s_own(shape: tuple[int, ...] | None) -> None:
    block, handle, own = accelerated(Conditioned)
    arguments = {"cond": None if shape is None else torch.ones(shape)}
    assert outcome(block, arguments) == outcome(own, arguments) and handle.backends == {"": "library"}


def double_of(module: nn.Module) -> Callable[..., Tensor]:
    forward = module.forward
    return lambda *arguments: 2 * forward(*arguments)


CHANGES: dict[str, Callable[[Any, pytest.MonkeyPatch], Any]] = {
    "activation": lambda block, _: block.attn_blocks[0].mlp.main.__setitem__(1, nn.SiLU()),
    "setting of an activation": lambda block, _: setattr(block.attn_blocks[0].mlp.main[1], "approximate", "tanh"),
    "eps": lambda block, _: setattr(block.attn_blocks[1].attention.norm, "eps", 0.1),
    "attention's scale": lambda block, _: setattr(block.attn_blocks[1].attention, "scale", 0.1),
    "heads": lambda block, _: setattr(block.attn_blocks[0].attention, "num_heads", 1),
    "factor": lambda block, _: setattr(block, "factor", 0.5),
    "factor in a tensor": lambda block, _: setattr(block, "factor", torch.tensor([0.5, 1.0, 2.0])),
    "factor in a list in a dict": lambda block, _: block.settings["factors"].__setitem__(0, 0.5),
    "buffer": lambda block, _: block.gain.mul_(0.5),
    "method of a class": lambda _, patch: patch.setattr(Perceptron, "forward", lambda self, h: self.main(h)),
    "method of PyTorch": lambda _, patch: patch.setattr(nn.LayerNorm, "forward", lambda self, h: h),
    "method of an object": lambda block, patch: patch.setattr(
        block.attn_blocks[0].mlp, "forward", double_of(block.attn_blocks[0].mlp)
    ),
    "class of a part": lambda block, _: setattr(block.attn_blocks[1], "__class__", PostNorm),
    "hook": lambda block, _: block.proj_out.register_forward_hook(lambda part, _, out: 0.5 * out),
    "shape": lambda block, _: setattr(block.attn_blocks[0].mlp.norm, "bias", None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_sends_calls_to_the_block_s_own_code(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = make("plain")
    with jf.accelerate(block) as handle:
        before = outcome(block, {})
        CHANGES[change](block, monkeypatch)
        expected = outcome(copy.deepcopy(block), {})
        assert outcome(block, {}) == expected != before
        assert handle.backends == {"": "library"}


def test_a_hook_on_all_modules_sends_calls_to_the_block_s_own_code() -> None:
    block = make("plain")
    with jf.accelerate(block) as handle:
        hook = nn.modules.module.register_module_forward_hook(lambda part, _, out: 0.5 * out)
        try:
            assert outcome(block, {}) == outcome(copy.deepcopy(block), {}) and handle.backends == {"": "library"}
        finally:
            hook.remove()
        assert outcome(block, {}) and handle.backends == {"": "native"}


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
