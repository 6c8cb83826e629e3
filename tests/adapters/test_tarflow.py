"""Calls of accelerated TarFlow blocks return what the blocks' own `reverse` does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacobiflow as jf
from tests.helpers.tarflow_blocks import CASES, TOKENS, Block, Conditioned, Perceptron, PostNorm, close, make, outcome

pytestmark = pytest.mark.usefixtures("one_thread")


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
        block.reverse(x)  # Dropout is active.
        block.eval().requires_grad_(True)
        with torch.enable_grad():
            assert block.reverse(x)[0].requires_grad
        assert handle.backends == {"": "library"}
        with pytest.raises(TypeError, match="reverse"):
            block.reverse(x, colour=3)


class UnconditionalBelowZero(Block):
    def embedding(self, rows: Tensor, y: Tensor | None) -> Tensor:
        embedding = super().embedding(rows, y)
        return (
            embedding if y is None else torch.where(torch.as_tensor(y).view(-1, 1, 1) < 0, rows.mean(dim=0), embedding)
        )


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
