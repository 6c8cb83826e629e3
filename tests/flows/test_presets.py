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
    """Also every tensor of the original's checkpoints, but the masks, by its name."""
    preset, (tokens, token_channels, channels, classes, noise) = jf.PRESETS[name], sizes
    config = preset.config
    assert (
        preset.guidance_weight,
        preset.denoise,
        preset.attn_temperature,
        preset.strategy,
        preset.annealed,
    ) == settings
    assert (config.num_tokens, config.token_channels) == (tokens, token_channels)
    assert (config.channels, config.num_classes, config.noise_std) == (channels, classes, noise)
    with torch.device("meta"):
        state = jf.TarFlow(config).state_dict()
    layer = [f"attention.{name}" for name in ("norm", "qkv", "proj")] + ["mlp.norm", "mlp.main.0", "mlp.main.2"]
    modules = ["proj_in", "proj_out"] + [f"attn_blocks.{m}.{part}" for m in range(8) for part in layer]
    tensors = ["pos_embed"] + [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    if classes:
        tensors.append("class_embed")
        assert state["blocks.7.class_embed"].shape == (classes, 1, channels)
    assert set(state) == {"var"} | {f"blocks.{n}.{tensor}" for n in range(8) for tensor in tensors}
    assert state["blocks.0.proj_out.weight"].shape == (2 * token_channels, channels)
    assert state["var"].shape == (tokens, token_channels)
    assert len(jf.PRESETS) == 4
