"""The exact inverse of a MAF block by native code, on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.flows.guidance import Guidance
from jacobiflow.flows.labels import embed_classes
from jacobiflow.native.masked import masked_transform, run_chain
from jacobiflow.native.structures import Elementwise, Function, Kind, Operation, Transform


@torch.no_grad()
def solve_rows(
    z: Float[Tensor, "b t"],
    layers: Sequence[Any],
    labels: Int[Tensor, " b"] | None,
    guidance: Guidance | None,
    units_below: tuple[int, ...],
) -> Float[Tensor, "b t"] | None:
    """Returns the rows x, token by token; `None` if out of memory or threads.

    Under guidance a second network, of the mean over classes, is evaluated too. `units_below` are the numbers of units
    of a hidden layer with a degree below d, for d from 0 to T - 1.
    """
    has_classes = layers[0].class_embed is not None
    shape = (len(layers[0].weight), len(layers))
    transforms, _ = _transforms(units_below, shape, has_classes, guidance is not None)
    tensors = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
    context = None
    if has_classes:
        tensors += [layer.class_embed.t() for layer in layers if layer.class_embed is not None]
        classes = tensors[-1].shape[1]
        context = embed_classes(torch.eye(classes, dtype=z.dtype), labels)
    if guidance is not None:
        tensors += [layer.offset(None).squeeze(0) for layer in layers]
        tensors.append(torch.stack(guidance.weights(z.unsqueeze(-1)), dim=1))
    tensors = [tensor.contiguous() for tensor in tensors]
    pointers = [tensor.data_ptr() for tensor in tensors]
    result = run_chain(transforms, pointers, z, context, is_inverse=True, log_det=None)
    return None if result is None else result.values


@lru_cache(maxsize=32)
def _transforms(
    units_below: tuple[int, ...], shape: tuple[int, int], has_classes: bool, is_guided: bool
) -> tuple[Any, Any]:
    """Describes the block to native code; returns the transforms, and the memory that they point to.

    The order of tensors: weight and bias of each layer, the classes' embeddings, the second network's biases, the
    guidance weights.
    """
    (units, layers), tokens = shape, len(units_below)
    hidden = (list(range(units)), list(units_below))
    second = (3 if has_classes else 2) * layers
    outputs = (list(range(2 * tokens)), [2 * token + 2 for token in range(tokens)])
    operations: list[tuple[Operation, Sequence[int], Sequence[int]]] = []

    def add(kind: Kind, order: Any, source: int, **fields: Any) -> int:
        operations.append((Operation(kind=kind, source=source, **{"weight": -1, "bias": -1, **fields}), *order))
        return len(operations)

    def network(is_second: bool) -> int:
        value = 0
        for layer in range(layers):
            is_hidden, has_context = layer + 1 < layers, has_classes and not is_second
            order, bias = (hidden if is_hidden else outputs), (second + layer if is_second else 2 * layer + 1)
            last = {"function": Function.RELU, "is_kept": True} if is_hidden else {}
            value = add(Kind.LINEAR, order, value, weight=2 * layer, bias=bias, **({} if has_context else last))
            if has_context:
                value = add(Kind.ADD_CONTEXT, order, value, weight=2 * layers + layer)
                value = add(Kind.ACTIVATION, order, value, **last) if is_hidden else value
        return value

    value = network(is_second=False)
    if is_guided:
        other = network(is_second=True)
        add(Kind.EXTRAPOLATION, outputs, value, other=other, bias=second + layers)
    order = list(range(tokens))
    transform, memory = masked_transform(
        [*order, tokens], order, operations, (order, order), kind=Elementwise.LOG_AFFINE, features=tokens, parameters=2
    )
    return (Transform * 1)(transform), memory
