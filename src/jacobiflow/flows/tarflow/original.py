"""The `.pth` state dicts of the original TarFlow code: its parameters under the same names, and causal masks."""

from __future__ import annotations

import math
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from jacobiflow.flows.folder import writing
from jacobiflow.flows.tarflow.config import TarFlowConfig
from jacobiflow.flows.weights import CheckpointError, check_values, count_layers, first_line, load_torch

_MASK = re.compile(r"blocks\.\d+\.attn_mask")


def read_original(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a `.pth` file, less the prefix of DistributedDataParallel.

    Only tensors are read: code in the file does not run, and no tensor is larger than what the file has of it.

    **Raises** `CheckpointError` where the file is missing, damaged, or holds anything but a dict of tensors.
    """
    remedy = "give a file that torch.save(model.state_dict(), path) wrote"
    try:
        state = load_torch(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path}: no PyTorch file, or one with code in it, which was not run; {remedy}") from None
    except Exception as error:  # torch.load names no exceptions, and damage raises nearly any
        raise CheckpointError(f"{path}: cut short or damaged ({first_line(error)}); copy it again") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, not a dict of tensors; {remedy}")
    others = [
        repr(key) if isinstance(key, str | int) else f"a {type(key).__name__}"  # which may be far too long
        for key, value in state.items()
        if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if others:
        raise CheckpointError(f"{path}: entries other than tensors: {', '.join(others)}; {remedy}")
    # Masks, which may share their memory, are not copied.
    weights = (t for name, t in state.items() if t.layout == torch.strided and not _MASK.search(name))
    needed = sum(tensor.nbytes for tensor in weights)
    if needed > os.path.getsize(path):
        raise CheckpointError(f"{path}: tensors of {needed:,} bytes that share their memory; {remedy}")
    prefix = "module."
    if all(name.startswith(prefix) for name in state):
        return {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return dict(state)


def take_masks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The causal masks, which are taken out of `state`."""
    return {name: state.pop(name) for name in list(state) if _MASK.fullmatch(name)}


def check_masks(masks: Mapping[str, Tensor], config: TarFlowConfig, source: str) -> None:
    """**Raises** `CheckpointError` where `masks` are not the causal masks of a TarFlow of this `config`."""
    size = (config.num_tokens, config.num_tokens)
    expected = [f"blocks.{i}.attn_mask" for i in range(config.num_blocks)]
    fits = {name for name in expected if name in masks and masks[name].shape == size}
    mask = _mask(config) if fits else None  # not made where nothing here is as large
    problems = [
        f"{name}: expected ones on and below the diagonal of {size}, zeros above"
        for name in expected
        if mask is None or name not in fits or not _equal(masks[name], mask)
    ]
    problems += [f"{name}: unknown" for name in masks if name not in expected]
    if problems:
        raise CheckpointError(f"{source}: {'; '.join(problems)}")


def write_original(state: Mapping[str, Tensor], config: TarFlowConfig, path: str | Path) -> None:
    """Write a `.pth` state dict that the original code loads strictly: `state`, and the causal masks.

    **Raises** `CheckpointError` where the original code has no such flow, a weight is not finite, or `path` cannot
    be written.
    """
    if (config.head_dim, config.expansion) != (64, 4):
        raise CheckpointError(
            f"head_dim={config.head_dim}, expansion={config.expansion}: the original code has 64 and 4 only; "
            "save a model folder instead"
        )
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    check_values(state, f"{path}: not written")
    with writing(Path(path)) as partial, partial.open("wb") as file:
        mask = _mask(config)
        torch.save(state | {f"blocks.{i}.attn_mask": mask for i in range(config.num_blocks)}, file)


def infer_config(
    state: Mapping[str, Tensor], *, patch_size: int | None = None, in_channels: int | None = None, head_dim: int = 64
) -> TarFlowConfig:
    """The config that the shapes of `state` say, for a square image; `noise_std`, which they do not, is 0.

    A token has in_channels * patch_size² values, so one of the two must be given.

    **Raises** `CheckpointError` where neither is given, they do not fit, or `state` is not of a TarFlow.
    """
    try:
        channels, token_channels = state["blocks.0.proj_in.weight"].shape
        num_tokens, _ = state["blocks.0.pos_embed"].shape
        outputs, _ = state["blocks.0.proj_out.weight"].shape
        hidden, _ = state["blocks.0.attn_blocks.0.mlp.main.0.weight"].shape
        num_classes = len(state["blocks.0.class_embed"]) if "blocks.0.class_embed" in state else 0
        num_blocks = count_layers(state, "blocks.")
        layers_per_block = count_layers(state, "blocks.0.attn_blocks.")
        for i in range(num_blocks):  # nothing is built for names that stand alone
            state[f"blocks.{i}.attn_blocks.{layers_per_block - 1}.mlp.main.0.weight"]
    except KeyError as error:
        raise CheckpointError(f"not the state dict of a TarFlow: no {error}") from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"not the state dict of a TarFlow: odd shapes ({first_line(error)})") from error
    side = math.isqrt(num_tokens)
    if (
        side**2 != num_tokens
        or not channels
        or hidden % channels
        or outputs not in (token_channels, 2 * token_channels)
    ):
        raise CheckpointError(
            f"not the state dict of a TarFlow: {num_tokens} tokens of {token_channels} values, {channels} channels, "
            f"{hidden} hidden, {outputs} outputs"
        )
    in_channels, patch_size = _token_sizes(token_channels, in_channels, patch_size)
    return TarFlowConfig(
        in_channels=in_channels,
        image_size=side * patch_size,
        patch_size=patch_size,
        channels=channels,
        num_blocks=num_blocks,
        layers_per_block=layers_per_block,
        num_classes=num_classes,
        nvp=outputs == 2 * token_channels,
        head_dim=head_dim,
        expansion=hidden // channels,
    )


def _token_sizes(token_channels: int, in_channels: int | None, patch_size: int | None) -> tuple[int, int]:
    """Channels and patch size of which at least one is given. **Raises** `CheckpointError` where they do not fit."""
    for name, value in (("patch_size", patch_size), ("in_channels", in_channels)):
        if value is not None and value < 1:
            raise CheckpointError(f"{name}={value}: give a positive whole number")
    if patch_size is None:
        if in_channels is None:
            raise CheckpointError(f"give patch_size: shapes say in_channels * patch_size² = {token_channels} only")
        patch_size = math.isqrt(token_channels // in_channels)
    if in_channels is None:
        in_channels = token_channels // patch_size**2
    if in_channels * patch_size**2 != token_channels:
        raise CheckpointError(
            f"patch_size={patch_size}, in_channels={in_channels}: in_channels * patch_size² must be {token_channels}"
        )
    return in_channels, patch_size


def _mask(config: TarFlowConfig) -> Tensor:
    """The buffer that only the original code has, in every block: the causal mask (T, T)."""
    return torch.ones(config.num_tokens, config.num_tokens).tril()


def _equal(tensor: Tensor, mask: Tensor) -> bool:
    dense = tensor.layout == torch.strided and not tensor.is_meta
    return dense and torch.equal(tensor.to(mask.dtype), mask)
