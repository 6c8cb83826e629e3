"""The MADE of nflows, and that of normflows, which is nearly the same, as operations."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import nn

from jacobiflow.adapters.masked import (
    Activation,
    Context,
    Linear,
    MaskedNetwork,
    Operation,
    Sum,
    has_hooks,
    is_elementwise,
)


def made_network(made: Any, library: ModuleType, features: int, conditional: bool) -> MaskedNetwork | None:
    """The operations of a MADE of the module `library`, called with a context or without; `None` where it has others.

    nflows adds the context to the hidden units of a residual block, where normflows gates the block's result by it. In
    front of the blocks nflows has an activation, which takes the context too.
    """
    if type(made) is not library.MADE:
        return None
    nflows, residual = hasattr(made, "use_residual_blocks"), any(hasattr(b, "linear_layers") for b in made.blocks)
    operations: list[Operation] = [Linear(0, made.initial_layer)]
    if conditional:
        operations.append(Context(1, made.context_layer, made.activation if nflows else nn.Identity()))
    if nflows and not made.use_residual_blocks:
        operations.append(Activation(len(operations), made.activation))
    for block in made.blocks:
        if residual:
            operations += _residual(block, len(operations), conditional, nflows)
        else:
            operations += [Linear(len(operations), block.linear), Activation(len(operations) + 1, block.activation)]
    operations.append(Linear(len(operations), made.final_layer))
    if not _only_known(made, library) or not all(
        is_elementwise(getattr(op, "function", torch.relu)) for op in operations
    ):
        return None
    outputs = torch.arange(made.final_layer.out_features, device="cpu").view(features, -1)
    return MaskedNetwork(tuple(operations), slice(0, features), outputs)


def _residual(block: Any, value: int, conditional: bool, nflows: bool) -> list[Operation]:
    """A block on `value`: value + linear(act(linear(act(value))))."""
    operations: list[Operation] = [Activation(value, block.activation), Linear(value + 1, block.linear_layers[0])]
    if conditional and nflows:
        operations.append(Context(value + 2, block.context_layer, nn.Identity()))
    last = value + len(operations)
    operations += [Activation(last, block.activation), Linear(last + 1, block.linear_layers[1])]
    if conditional and not nflows:
        operations.append(Context(last + 2, block.context_layer, nn.Identity(), gate=True))
    return [*operations, Sum(value + len(operations), value)]


def _only_known(made: nn.Module, library: ModuleType) -> bool:
    """Whether its parts are the library's own and PyTorch's, without hooks, and none normalises a batch."""
    own = (library.MADE, library.MaskedLinear, library.MaskedResidualBlock, library.MaskedFeedforwardBlock)
    plain = (nn.ModuleList, nn.Linear, nn.Dropout)  # in training mode dropout is left to the library
    return all(
        not has_hooks(part) and (type(part) in (*own, *plain) or is_elementwise(part)) for part in made.modules()
    )
