"""The `.pth` state dicts of the TarFlow code and its forks: nearly our names, and a causal mask in each block."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor

from jacobiflow.errors import CheckpointError, first_line
from jacobiflow.models.checkpoints.folder import check_values
from jacobiflow.models.config import TarFlowConfig, TokenConfig
from jacobiflow.utils.checks import FLOATS
from jacobiflow.utils.files import regular_file

_MASK = re.compile(r"blocks\.\d+\.attn_mask")
_NAMES = {".mlp.main.3.": ".mlp.main.2.", ".cond_proj.": ".proj_context."}  # SBG has dropout before it; autocast


def read_original(path: str | Path) -> dict[str, Tensor]:
    """Reads the tensors in a `.pth` file, without causal masks and without the prefix of DistributedDataParallel.

    Raises CheckpointError if an entry is not a dense tensor of floating-point numbers, or a mask is not causal.
    """
    remedy = "give a file that torch.save(model.state_dict(), path) wrote"
    try:
        # Mapped, if the file has the format that can be: only what is used is read.
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(regular_file(path)))
    except Exception as error:  # torch.load names no exceptions, and damage raises nearly any
        raise CheckpointError(
            f"{path}: missing, damaged, or not only tensors; code in it was not run ({first_line(error)}); {remedy}"
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise CheckpointError(f"{path}: not a dict of tensors by their names; {remedy}")
    state = {_name(name): tensor for name, tensor in content.items()}
    check_values(state, str(path), (*FLOATS, torch.bool), checks_values=False)
    masks = {name: state.pop(name) for name in list(state) if _MASK.fullmatch(name)}
    for name, mask in masks.items():
        if mask.ndim != 2 or not torch.equal(mask != 0, torch.ones(len(mask), len(mask), dtype=torch.bool).tril()):
            raise CheckpointError(f"{path}: {name} is not the causal mask; all attention is causal here")
    return state


def shape_of(state: Mapping[str, Tensor], source: str, flow: str, name: str, rank: int) -> tuple[int, ...]:
    """Returns the shape of an entry; a CheckpointError says if it is missing, of another rank or empty."""
    if name not in state:
        raise CheckpointError(f"{source}: not the state dict of a {flow}, which has {name!r}")
    shape = tuple(state[name].shape)
    if len(shape) != rank or 0 in shape:
        raise CheckpointError(
            f"{source}: {name} has shape {shape}; in a {flow} it has {rank} dimensions, none of them 0"
        )
    return shape


def _name(name: str) -> str:
    for theirs, ours in _NAMES.items():
        name = name.replace(theirs, ours)
    return name.removeprefix("module.")


def infer_config(
    state: Mapping[str, Tensor], source: str, patch_size: int | None = None
) -> TarFlowConfig | TokenConfig:
    """Reads the config of a flow over tokens from shapes, or of one over square images of patches of `patch_size`.

    `head_dim` is 64. A CheckpointError begins with `source`.
    """
    shape = partial(shape_of, state, source, "TarFlow")
    blocks = range(count_groups(state, r"blocks\.(\d+)\.proj_in\.weight"))
    num_tokens, _ = shape("blocks.0.pos_embed", 2)
    _, token_channels = shape("blocks.0.proj_in.weight", 2)
    widths = tuple(shape(f"blocks.{i}.proj_in.weight", 2)[0] for i in blocks)
    outputs, _ = shape("blocks.0.proj_out.weight", 2)
    hidden, _ = shape("blocks.0.attn_blocks.0.mlp.main.0.weight", 2)
    classes, context = "blocks.0.class_embed", "blocks.0.proj_context.weight"
    config = TokenConfig(
        num_tokens=num_tokens,
        token_channels=token_channels,
        channels=_one_or_all(widths),
        num_blocks=len(blocks),
        layers_per_block=_one_or_all(tuple(count_groups(state, rf"blocks\.{i}\.attn_blocks\.(\d+)\.") for i in blocks)),
        num_classes=shape(classes, 3)[0] if classes in state else 0,
        context_channels=shape(context, 2)[1] if context in state else 0,
        nvp=outputs == 2 * token_channels,
        expansion=hidden // widths[0],
    )
    return config if patch_size is None else _of_images(config, source, patch_size)


def _of_images(config: TokenConfig, source: str, patch_size: int) -> TarFlowConfig:
    side, num_tokens, token_channels = math.isqrt(config.num_tokens), config.num_tokens, config.token_channels
    if side**2 != num_tokens:
        raise CheckpointError(
            f"{source}: {num_tokens} tokens, but square images have a square number of them; leave patch_size out for "
            "a flow over tokens"
        )
    if patch_size < 1 or token_channels % patch_size**2:
        raise CheckpointError(
            f"{source}: patch_size={patch_size}: its square must divide the {token_channels} values of a token"
        )
    if not isinstance(config.channels, int) or not isinstance(config.layers_per_block, int) or config.context_channels:
        raise CheckpointError(
            f"{source}: blocks of different sizes, or with a context of numbers; leave patch_size out"
        )
    return TarFlowConfig(
        token_channels // patch_size**2, side * patch_size, patch_size, config.channels, config.num_blocks,
        config.layers_per_block, config.num_classes, config.nvp, expansion=config.expansion,
    )  # fmt: skip


def _one_or_all(sizes: tuple[int, ...]) -> int | tuple[int, ...]:
    return sizes[0] if len(set(sizes)) == 1 else sizes


def count_groups(state: Mapping[str, Tensor], pattern: str) -> int:
    """Returns the number of different matches of the group in `pattern`."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})
