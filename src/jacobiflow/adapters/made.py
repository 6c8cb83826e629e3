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
    UnsupportedError,
    check_plain,
)
from jacobiflow.adapters.part import Slot

_PLAIN = (nn.ModuleList, nn.Linear, nn.Dropout, nn.Identity)


def made_network(made: Any, library: ModuleType, parameters: int, is_conditional: bool) -> MaskedNetwork:
    """The operations of a MADE of the module `library`, called with a context or without.

    nflows adds the context to the hidden units of a residual block, where normflows gates the block's result by it. In
    front of the blocks nflows has an activation, which takes the context too.

    Raises:
        UnsupportedError: If it has other parts.
    """
    if type(made) is not library.MADE:
        raise UnsupportedError(f"the network {type(made).__name__}")
    _check_known(made, library)
    if is_conditional and not hasattr(made, "context_layer"):
        raise UnsupportedError("a context for a network without")
    is_nflows, residual = hasattr(made, "use_residual_blocks"), any(hasattr(b, "linear_layers") for b in made.blocks)
    operations: list[Operation] = [Linear(0, made.initial_layer)]
    if is_conditional:
        operations.append(Context(1, made.context_layer, made.activation if is_nflows else nn.Identity()))
    if is_nflows and not made.use_residual_blocks:
        operations.append(Activation(len(operations), made.activation))
    for block in made.blocks:
        if residual:
            operations += _residual(block, len(operations), is_conditional, is_nflows)
        else:
            operations += [Linear(len(operations), block.linear), Activation(len(operations) + 1, block.activation)]
    operations.append(Linear(len(operations), made.final_layer))
    outputs = torch.arange(made.final_layer.out_features, device="cpu").view(-1, parameters)
    return MaskedNetwork(tuple(operations), slice(0, len(outputs)), outputs)


def made_attributes(made: Any) -> tuple[Slot, ...]:
    """The functions that its operations depend on, and that are not modules."""
    return tuple((vars(part), "activation") for part in made.modules() if "activation" in vars(part))


def _residual(block: Any, value: int, is_conditional: bool, is_nflows: bool) -> list[Operation]:
    """A block on `value`: value + linear(act(linear(act(value))))."""
    operations: list[Operation] = [Activation(value, block.activation), Linear(value + 1, block.linear_layers[0])]
    if is_conditional and is_nflows:
        operations.append(Context(value + 2, block.context_layer, nn.Identity()))
    last = value + len(operations)
    operations += [Activation(last, block.activation), Linear(last + 1, block.linear_layers[1])]
    if is_conditional and not is_nflows:
        operations.append(Context(last + 2, block.context_layer, nn.Identity(), gate=True))
    return [*operations, Sum(value + len(operations), value)]


def _check_known(made: nn.Module, library: ModuleType) -> None:
    """Checks that its parts are the library's own and PyTorch's, and that none normalises a batch."""
    own = (library.MADE, library.MaskedLinear, library.MaskedResidualBlock, library.MaskedFeedforwardBlock)
    activations = [module._modules.get("activation") for module in made.modules()]
    for part in made.modules():
        check_plain(part)
        if type(part) not in (*own, *_PLAIN) and not any(part is activation for activation in activations):
            raise UnsupportedError(f"{type(part).__name__} in its network")
