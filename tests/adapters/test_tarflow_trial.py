"""The trial of live TarFlow blocks: forks that compute something else are left alone, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacobiflow as jf
from jacobiflow.native import SWITCH
from tests.helpers.tarflow_blocks import TOKENS, Block, Boltzmann, PostNorm, make

pytestmark = pytest.mark.usefixtures("one_thread")


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
    assert handle.reasons == {"1": "its reverse computes something else than that of a TarFlow block"}
    assert torch.equal(torch.get_rng_state(), state)


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
    with pytest.raises(ValueError, match=r"0: attn_blocks\.0\.mlp\.main\.1 is not .* nothing was changed"):
        jf.accelerate(nn.ModuleList([other_part]), strict=True)
