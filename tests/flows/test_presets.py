"""The paper's models."""

from __future__ import annotations

import pytest
import torch

import jacobiflow as jf


@pytest.mark.parametrize(
    ("name", "tokens", "token_channels", "classes", "strategy"),
    [
        ("img128cond", 1024, 48, 1000, "[6-8-32-10]"),
        ("afhq", 1024, 192, 3, "[7-8-32-10]"),
        ("img64uncond", 1024, 12, 0, "[0/6-8-32-20]"),
        ("img64cond", 256, 48, 1000, "[0/7-16/8-10/13-6]"),
    ],
)
def test_presets_are_those_of_the_tables(
    name: str, tokens: int, token_channels: int, classes: int, strategy: str
) -> None:
    preset = jf.PRESETS[name]
    assert preset.strategy == strategy
    with torch.device("meta"):
        state = jf.TarFlow(preset.config).state_dict()
    assert state["var"].shape == (tokens, token_channels)
    assert len(state) == 1 + 8 * (5 + bool(classes) + 8 * 12)
    assert not classes or len(state["blocks.7.class_embed"]) == classes
