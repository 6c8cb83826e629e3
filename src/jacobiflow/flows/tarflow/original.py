"""The `.pth` state dicts of the original TarFlow code: the same names, and a causal mask in each block."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacobiflow.errors import CheckpointError, first_line
from jacobiflow.flows.config import TarFlowConfig

_MASK = re.compile(r"blocks\.\d+\.attn_mask")


def read_original(path: str | Path) -> dict[str, Tensor]:
    """Reads the tensors in a `.pth` file, without causal masks and without the prefix of DistributedDataParallel."""
    remedy = "give a file that torch.save(model.state_dict(), path) wrote"
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    except Exception as error:  # torch.load names no exceptions, and damage raises nearly any
        raise CheckpointError(
            f"{path}: cut short, damaged, or not only tensors; code in it was not run ({first_line(error)}); {remedy}"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise CheckpointError(f"{path}: not a dict of tensors; {remedy}")
    state = {name.removeprefix("module."): tensor for name, tensor in content.items()}
    return {name: tensor for name, tensor in state.items() if not _MASK.fullmatch(name)}


def infer_config(state: Mapping[str, Tensor], *, patch_size: int) -> TarFlowConfig:
    """Reads the config of a square image's flow from shapes, which do not tell `patch_size`; `head_dim` is 64."""
    try:
        channels, token_channels = state["blocks.0.proj_in.weight"].shape
        num_tokens, _ = state["blocks.0.pos_embed"].shape
        outputs, _ = state["blocks.0.proj_out.weight"].shape
        hidden, _ = state["blocks.0.attn_blocks.0.mlp.main.0.weight"].shape
    except KeyError as error:
        raise CheckpointError(f"not the state dict of a TarFlow: no {error}") from None
    side = math.isqrt(num_tokens)
    if side**2 != num_tokens:
        raise CheckpointError(f"{num_tokens} tokens: a TarFlow of square images has a square number of them")
    if patch_size < 1 or token_channels % patch_size**2:
        raise CheckpointError(f"patch_size={patch_size}: its square must divide the {token_channels} values of a token")
    return TarFlowConfig(
        in_channels=token_channels // patch_size**2,
        image_size=side * patch_size,
        patch_size=patch_size,
        channels=channels,
        num_blocks=_count(state, r"blocks\.(\d+)\."),
        layers_per_block=_count(state, r"blocks\.0\.attn_blocks\.(\d+)\."),
        num_classes=len(state["blocks.0.class_embed"]) if "blocks.0.class_embed" in state else 0,
        nvp=outputs == 2 * token_channels,
        expansion=hidden // channels,
    )


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Returns the number of different matches of the group in `pattern`."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})
