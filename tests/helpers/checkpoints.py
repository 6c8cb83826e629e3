"""A small flow with every tensor random, and the one-line messages of errors, for tests of files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import jacobiflow as jf

SIZES = {"width": 8, "num_blocks": 2, "layers_per_block": 1, "num_classes": 3, "head_dim": 4, "expansion": 2}
SMALL = jf.TarFlowConfig(1, 4, 2, **SIZES, noise_std=0.1)


def make(config: jf.TarFlowConfig = SMALL, seed: int = 0) -> jf.TarFlow:
    """A flow whose every tensor is random, `var` positive."""
    flow = jf.TarFlow(config)
    generator = torch.Generator().manual_seed(seed)
    state = {name: 0.1 * torch.randn(t.shape, generator=generator) for name, t in flow.state_dict().items()}
    flow.load_state_dict(state | {"var": state["var"].square() + 0.1})
    return flow


def assert_same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


def error_of(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The message of the CheckpointError that the call raises; one line."""
    with pytest.raises(jf.CheckpointError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)
