"""The presets."""

from __future__ import annotations

import jacobiflow as jf


def test_presets_are_those_of_the_paper_s_tables() -> None:
    shapes = {}
    for name, preset in jf.PRESETS.items():
        config = preset.config
        assert (config.num_blocks, config.layers_per_block, config.nvp, config.head_dim) == (8, 8, True, 64)
        shapes[name] = config.num_tokens, config.token_dim, config.width, config.num_classes, preset.strategy
    assert shapes == {
        "img128cond": (1024, 48, 1024, 1000, "[6-8-32-10]"),
        "img64uncond": (1024, 12, 768, 0, "[0/6-8-32-20]"),
        "afhq": (1024, 192, 768, 3, "[7-8-32-10]"),
        "img64cond": (256, 48, 1024, 1000, "[0/7-16/8-10/13-6]"),
    }
