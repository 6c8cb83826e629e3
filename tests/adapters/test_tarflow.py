"""Accelerated TarFlow blocks return what their own `reverse` does; forks that compute something else are left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacobiflow as jf
from jacobiflow.adapters import tarflow_trial
from jacobiflow.native import SWITCH
from tests.helpers.library_flows import default_dtype
from tests.helpers.tarflow_blocks import (
    CASES,
    TOKENS,
    Block,
    Boltzmann,
    Conditioned,
    Perceptron,
    PostNorm,
    close,
    make,
    outcome,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def short_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tarflow_trial, "_FEW_TOKENS", 4)


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
        assert str(handle).endswith(
            "in the latest call by its own code: the block was in training mode (call model.eval())"
        )
        block.eval().requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16):
            block.reverse(x)
        assert "torch.autocast was enabled" in str(handle)
        with torch.enable_grad():
            assert block.reverse(x)[0].requires_grad
        assert "gradients were enabled (use torch.no_grad())" in str(handle)
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
    "too many labels": {"y": torch.arange(5) % 3},
    "label below 0": {"y": torch.tensor([0, -1, 2, 1])},
    "label out of range": {"y": torch.tensor([0, 1, 2, 3])},
    "labels that are no integers": {"y": torch.tensor([0.0, 1.0, 2.0, 0.0])},
    "list": {"y": [0, 1, 2, 0]},
    "x of two dimensions": {"x": torch.zeros(TOKENS, 3)},
    "x of other width": {"x": torch.zeros(4, TOKENS, 2)},
    "x of other dtype": {"x": torch.zeros(4, TOKENS, 3, dtype=torch.float64)},
    "too many tokens": {"x": torch.zeros(4, TOKENS + 1, 3)},
    "no samples": {"x": torch.zeros(0, TOKENS, 3)},
    "guidance below 0": {"guidance": -1.0},
    "large guidance": {"y": torch.tensor([0, 1, 2, 1]), "guidance": 30.0},
    "guidance in a tensor": {"y": torch.tensor([0, 1, 2, 1]), "guidance": torch.tensor(0.5)},
    "guidance of scale": {"y": torch.tensor([0, 1, 2, 1]), "guidance": 0.5, "guide_what": "scale"},
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
    assert "by native code, in the latest call by its own code: " in str(handle)
    assert outcome(block, {"y": torch.tensor([2, 0, 1, 2])}) and handle.backends == {"": "native"}
    assert str(handle).endswith("by native code")


@pytest.mark.parametrize("shape", [None, (6, 5), (4, 6, 4), (3, 6, 5), (4, 5, 5), (1, 6, 5)])
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
    "hook on all modules": lambda _, patch: patch.setitem(
        nn.modules.module._global_forward_hooks, 0, lambda part, _, out: 0.5 * out
    ),
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


class Clamped(Block):
    def network(self, x: Tensor, y: Tensor | None, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        log_scale, shift = super().network(x, y, temperature)
        return log_scale.clamp(-3, 3), shift


class Windowed(Block):
    def __init__(self) -> None:
        super().__init__()
        for layer in self.attn_blocks:
            layer.attention.window = 3


class OtherAfterTheThird(Block):
    def network(self, x: Tensor, y: Tensor | None, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        log_scale, shift = super().network(x, y, temperature)
        return log_scale, torch.cat((shift[:, :3], shift[:, 3:] + 0.1), dim=1)


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


FORKS: dict[str, tuple[type[Block], dict[str, Any]]] = {
    "log-scales up to 3": (Clamped, {}),
    "a window of 3 tokens": (Windowed, {}),
    "positions after the third": (OtherAfterTheThird, {}),
    "equal labels": (OneClassIsNone, {"classes": 3}),
    "guidance up to 4": (ClippedGuidance, {"classes": 3}),
    "attention temperature without guidance": (AlwaysTempered, {}),
    "another log-determinant": (MeanLogDet, {}),
}


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "default dtype": lambda: default_dtype(torch.float64),
    "default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize(
    ("name", "surroundings"),
    [*((name, "as usual") for name in FORKS), *(("a window of 3 tokens", name) for name in SURROUNDINGS)],
)
def test_a_fork_that_computes_something_else_is_left_alone(name: str, surroundings: str) -> None:
    kind, sizes = FORKS[name]
    torch.manual_seed(0)
    flow, state = nn.ModuleList([make("classes"), kind(**sizes)]), torch.get_rng_state()
    with SURROUNDINGS.get(surroundings, nullcontext)():
        handle = jf.accelerate(flow)
    assert list(handle.transforms) == ["0"]
    assert handle.reasons == {"1": "its reverse computes something else than that of a TarFlow block"}
    assert torch.equal(torch.get_rng_state(), state)


def test_blocks_that_differ_only_in_weights_share_a_part_of_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    trial, calls = tarflow_trial._Trial, []
    compare = trial.compare_random_weights
    monkeypatch.setattr(trial, "compare_random_weights", lambda self: calls.append(self) or compare(self))
    blocks = [Block(dropout=0.1), Block(dropout=0.1), Block(dropout=0.2)]
    blocks[2].gain = torch.ones(1)
    assert len(jf.accelerate(nn.ModuleList(blocks)).transforms) == 3
    assert len(calls) == 2


def test_without_native_code_a_block_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    handle = jf.accelerate(nn.ModuleList([make("plain")]))
    assert (handle.transforms, handle.reasons) == ({}, {"0": f"native code is off, by {SWITCH}=0"})


def test_a_block_that_differs_is_left_alone_by_name() -> None:
    other_layer, other_part, other_call = make("plain"), make("plain"), make("plain")
    other_layer.attn_blocks[1].__class__ = PostNorm
    other_part.attn_blocks[0].mlp.main[1] = nn.SiLU()
    other_call.reverse = lambda x: x  # type: ignore[method-assign, assignment]
    stack = nn.ModuleList([make("plain"), other_layer, other_part, other_call])
    handle = jf.accelerate(stack)
    assert list(handle.transforms) == ["0"]
    assert handle.reasons == {
        "1": "its reverse computes something else than that of a TarFlow block",
        "2": "attn_blocks.0.mlp.main.1 is not that of a TarFlow block",
        "3": "its reverse was replaced",
    }
