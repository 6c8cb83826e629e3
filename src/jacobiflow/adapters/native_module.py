"""A library's transform, composition or flow, computed by native code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacobiflow.adapters.library_module import copy_with_tensors
from jacobiflow.adapters.network import LibraryNetwork, Slot
from jacobiflow.adapters.snapshot import ModuleSnapshot, check_call
from jacobiflow.errors import UnsupportedError
from jacobiflow.native.boundary import TransformKind
from jacobiflow.native.chain import TransformChain
from jacobiflow.native.transforms import ChainTransform, affine_transform, masked_transform

TransformOutput = tuple[Tensor, Tensor | None]
"""The transformed rows, and the log-determinants of the Jacobian if the caller wants them."""

LibraryCall = Callable[[Any, Float[Tensor, "b d"], Float[Tensor, "b c"] | None], TransformOutput]
"""Module, rows, context -> the output by the library's own code."""


@dataclass(frozen=True)
class TransformSpec:
    """A library's transform as native code takes it.

    Attributes:
        transform: The native transform.
        tensors: Weights, biases, scales and shifts. Their values are read at every call.
        constants: Masks and indices, which must not change.
    """

    transform: ChainTransform
    tensors: Sequence[Slot] = ()
    constants: Sequence[Slot] = ()


ListTransforms = Callable[[Any, bool], Iterator[tuple[TransformSpec, bool]]]
"""Module, whether there is a context -> pairs (transform, is_inverted) in forward order.

Raises UnsupportedError if native code does not take one of the transforms.
"""


def masked_spec(network: LibraryNetwork, **fields: Any) -> TransformSpec:
    """Returns an elementwise transform whose parameters a network gives; `fields` are those of `masked_transform`."""
    return TransformSpec(masked_transform(network, **fields), network.tensors, network.constants)


def affine_spec(scale: Slot, shift: Slot, kind: Any = TransformKind.AFFINE) -> TransformSpec:
    """Returns the transform y = scale x + shift, or another kind of `affine_transform`."""
    of_scale, of_shift = (holder[name].shape for holder, name in (scale, shift))
    return TransformSpec(affine_transform(of_scale, of_shift, kind), (scale, shift))


class NativeModule:
    """A library's transform, composition or flow as native code takes it, with a context or without one.

    Attributes:
        snapshot: The module as it was when this was made.
        obstacle: Why native code does not take the module, or `None` if it does.
        chain: Its transforms.
        uses: What `Acceleration` records of a call: for each transform, the number of passes and the backend.
    """

    chain: TransformChain
    uses: dict[nn.Module, tuple[int, str]]

    def __init__(self, module: nn.Module, list_transforms: ListTransforms, is_conditional: bool) -> None:
        self._module = module
        self.obstacle: str | None = None
        constants: list[Slot] = []
        try:
            for child in module.modules():
                check_call(child)
            specs = list(list_transforms(module, is_conditional))
            self.chain = TransformChain([(spec.transform, is_inverted) for spec, is_inverted in specs])
            constants = [slot for spec, _ in specs for slot in spec.constants]
            if any(holder[name].is_inference() for holder, name in constants):
                raise UnsupportedError("masks of inference mode")  # They do not count their changes.
        except UnsupportedError as error:
            self.obstacle, constants = str(error), []
        else:
            self._tensors = [slot for spec, _ in specs for slot in spec.tensors]
        self.snapshot = ModuleSnapshot(module, constants)

    def tensors(self) -> list[Any]:
        """Returns the tensors of the chain as they are now."""
        return [holder.get(name) for holder, name in self._tensors]

    def evaluate_in_pytorch(
        self, library_call: LibraryCall, x: Tensor, context: Tensor | None, tensors: Sequence[Tensor]
    ) -> TransformOutput:
        """Repeats a call by the library's code, with these tensors as weights."""
        places = [(id(holder), name) for holder, name in self._tensors]
        module = copy_with_tensors(self._module, dict(zip(places, tensors, strict=True)))
        return library_call(module, x, None if context is None else context.expand(len(x), -1))


def flatten_batch(
    x: Float[Tensor, "*batch d"], context: Float[Tensor, "*batch c"] | None
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "#b c"] | None, torch.Size]:
    """Returns the rows, one context for each row or for all, and the shape of the batch that both broadcast to."""
    batch, features = x.shape[:-1], x.shape[-1]
    if x.ndim == 2 and (context is None or (context.ndim == 2 and context.shape[0] == batch[0])):
        return x, context, batch
    if context is None:
        return x.reshape(-1, features), None, batch
    batch_of_context, width = context.shape[:-1], context.shape[-1]
    if batch_of_context != batch and (len(batch_of_context) > len(batch) or batch_of_context.numel() != 1):
        batch = torch.broadcast_shapes(batch, batch_of_context)  # It is slow, so it is called only if needed.
        x = x.expand(*batch, features)
    if batch_of_context.numel() == 1:
        return x.reshape(-1, features), context.reshape(1, width), batch
    return x.reshape(-1, features), context.expand(*batch, width).reshape(-1, width), batch
