"""The state of a live TarFlow block, to notice changes of it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from jacobiflow.adapters.library_module import library_class

_PYTORCH_NAMES = vars(nn.Module()).keys()  # The attributes of every module.

BlockState = tuple[list[Any], list[Tensor]]
"""The classes of a block with their attributes, its settings and the shapes of its weights; and its buffers."""


def read_state(block: nn.Module) -> BlockState:
    """Returns the state of a block, which a fork of TarFlow may extend by attributes of any kind."""
    parts = list(block.modules())
    bases = dict.fromkeys(base for part in parts for base in library_class(part).__mro__)
    settings: list[Any] = [list(vars(base).values()) for base in bases]
    buffers: list[Tensor] = []
    for part in parts:
        attributes = {name: value for name, value in vars(part).items() if name not in _PYTORCH_NAMES} | part._buffers
        tensors = {name: value for name, value in attributes.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in attributes.items() if name not in tensors}
        shapes = {name: None if weight is None else weight.shape for name, weight in part._parameters.items()}
        settings.append((library_class(part), list(part._modules), list(tensors), others, shapes))
        buffers += tensors.values()
    return settings, buffers


def copy_state(state: BlockState) -> BlockState:
    """Returns a copy that later changes of the block leave alone."""
    settings, buffers = state
    return _copy(settings), [buffer.clone() for buffer in buffers]


def is_same_state(first: BlockState, second: BlockState) -> bool:
    """Returns True if two blocks differ only in the values of their weights."""
    try:
        return first[0] == second[0] and all(map(torch.equal, first[1], second[1]))
    except Exception:  # Some attributes cannot be compared.
        return False


def _copy(value: Any) -> Any:
    if type(value) is dict:
        return {name: _copy(entry) for name, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copy, value))
    has_values = type(value).__eq__ is not object.__eq__  # type: ignore[comparison-overlap]
    return copy.copy(value) if has_values else value
