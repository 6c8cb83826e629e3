"""The paper's models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import jacobiflow as jf


@pytest.mark.parametrize(
    ("name", "sizes", "settings"),
    [
        ("img128cond", (1024, 48, 1024, 1000, 0.15), (1.5, 0.97, 1.0, "[6-8-32-10]", True)),
        ("afhq", (1024, 192, 768, 3, 0.07), (3.4, 1.4, 1.0, "[7-8-32-10]", True)),
        ("img64uncond", (1024, 12, 768, 0, 0.05), (0.2, 0.9, 0.3, "[0/6-8-32-20]", True)),
        ("img64cond", (256, 48, 1024, 1000, 0.05), (2.0, 1.0, 1.0, "[0/7-16/8-10/13-6]", True)),
    ],
)
def test_presets_are_those_of_the_tables(name: str, sizes: tuple[Any, ...], settings: tuple[Any, ...]) -> None:
    preset, (tokens, token_channels, channels, classes, noise) = jf.PRESETS[name], sizes
    config = preset.config
    given = (preset.guidance_weight, preset.denoise, preset.attn_temperature, preset.strategy, preset.annealed)
    assert given == settings
    assert (config.num_tokens, config.token_channels) == (tokens, token_channels)
    assert (config.channels, config.num_classes, config.noise_std) == (channels, classes, noise)
    with torch.device("meta"):
        state = jf.TarFlow(config).state_dict()
    assert len(state) == 1 + 8 * (5 + bool(classes) + 8 * 12)
    assert not classes or state["blocks.7.class_embed"].shape == (classes, 1, channels)
    assert state["blocks.0.proj_out.weight"].shape == (2 * token_channels, channels)
    assert state["var"].shape == (tokens, token_channels)
    assert len(jf.PRESETS) == 4
