"""Configs: sizes and orders that cannot be are refused."""

from __future__ import annotations

from dataclasses import field, make_dataclass, replace
from typing import Any

import pytest

import jacobiflow as jf
from jacobiflow.models.config import check_sizes

TOKENS = jf.TokenConfig(5, 2, width=64, num_blocks=2, layers_per_block=1)
STAR = jf.STARFlowConfig(3, 4, 2, 64, (1, 2), text_tokens=3, text_dim=5)


@pytest.mark.parametrize("kind", ["int", int], ids=["annotation as text", "annotation"])
def test_the_sizes_of_a_config_are_checked(kind: Any) -> None:
    sizes = {"num_blocks": -3, "num_classes": 0, "noise_std": 0.0, "num_tokens": 4, "token_dim": 1}
    config = make_dataclass("Config", [(name, kind, field(default=size)) for name, size in sizes.items()])
    with pytest.raises(ValueError, match="num_blocks=-3"):
        check_sizes(config())


@pytest.mark.parametrize(
    ("config", "change", "words"),
    [
        (TOKENS, {"orders": ((0, 1, 1, 2, 3),)}, "give each of 0 to 4 once"),
        (TOKENS, {"orders": ((1, 0),)}, "indices of 5 tokens"),
        (TOKENS, {"orders": ("back",)}, "'identity' or 'flip'"),
        (TOKENS, {"orders": ()}, r"orders=\(\): give one or more"),
        (TOKENS, {"orders": ((0.0, True, 2, 3, 4),)}, r"order=\(0.0, True, 2, 3, 4\) of type tuple: give a value of"),
        (TOKENS, {"orders": ("flip", None)}, 'order=None.*: give "identity", "flip" or a tuple of indices'),
        (TOKENS, {"width": (8, 8, 8)}, "one for each of 2 blocks"),
        (TOKENS, {"num_classes": 2, "context_dim": 2}, "either classes or numbers"),
        (TOKENS, {"layers_per_block": (1, 10**6)}, "1,000,001 layers in 2 blocks: the limit is 1,024; give fewer"),
        (TOKENS, {"num_blocks": 2000}, "2,000 layers in 2,000 blocks"),
        (STAR, {"head_dim": 16}, "give 20 or"),
        (STAR, {"layers_per_block": (1, 0)}, "layers_per_block=0"),
        (STAR, {"layers_per_block": ()}, r"layers_per_block=\(\): give a tuple with a number for each block"),
        (STAR, {"image_size": 10**6}, "num_tokens=250000000000: the limit is"),
    ],
)
def test_a_config_that_cannot_be_is_named(config: Any, change: dict[str, Any], words: str) -> None:
    with pytest.raises(jf.InputError, match=words):
        replace(config, **change)
