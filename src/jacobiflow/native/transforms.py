"""The transforms of a chain, as structures for native code."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from jacobiflow.errors import UnsupportedError
from jacobiflow.native.boundary import Operation, SplineBoundary, Transform, TransformKind
from jacobiflow.native.masked_network import MaskedNetwork, Order, Place, Units, coupling_order, find_order
from jacobiflow.native.tensors import address_of

# With more coefficients, the binomial coefficients of a Bernstein polynomial overflow a float.
_MAX_COEFFICIENTS = 100


@dataclass(frozen=True)
class ChainTransform:
    """A transform of a chain, whose sizes fit each other.

    Attributes:
        structure: The transform for native code.
        memory: What `structure` points to.
        shapes: The shapes of its tensors.
        features: D, or `None` if it takes any.
        context: The width of the context that its network takes, or `None` if it has no network.
        places: The places of its tensors in the modules of a library, if it is one of a library.
    """

    structure: Transform
    memory: Any = None
    shapes: Sequence[tuple[int, ...]] = ()
    features: int | None = None
    context: int | None = None
    places: Sequence[Place] = ()

    @property
    def is_coupling(self) -> bool:
        """True if its network reads only features that stay as they are."""
        return bool(self.structure.num_operations and self.structure.inputs < self.structure.features)

    def inverse(self) -> ChainTransform:
        """Returns the inverse transform."""
        structure = Transform.from_buffer_copy(self.structure)
        structure.is_inverted = not structure.is_inverted
        return replace(self, structure=structure)


def invert_transforms(transforms: Iterable[ChainTransform]) -> Iterator[ChainTransform]:
    """Yields the transforms of the inverse of a chain."""
    return (each.inverse() for each in reversed(list(transforms)))


def permutation_transform(order: Sequence[int]) -> ChainTransform:
    """Returns the transform y_i = x_order[i]."""
    if sorted(order) != list(range(len(order))):
        raise UnsupportedError("an order that is not a permutation")
    indices = _integers(order)
    structure = Transform(kind=TransformKind.PERMUTATION, features=len(order), order=ctypes.addressof(indices))
    return ChainTransform(structure, indices, features=len(order))


def affine_transform(scale: Place, shift: Place, kind: Any = TransformKind.AFFINE) -> ChainTransform:
    """Returns the transform y = scale x + shift, of the tensors at two places: one number, or one for each feature.

    With the kind `NORMAL` it is y = x, whose log-determinant is the log-density of N(shift, scale^2) at x. At the end
    of a chain it makes the log-determinant of the whole the log-density of a flow.
    """
    shapes = [holder[name].shape for holder, name in (scale, shift)]
    sizes = [shape.numel() for shape in shapes]
    features = max(sizes)
    if any(size not in (1, features) for size in sizes):
        raise UnsupportedError("a scale and a shift of different sizes")
    structure = Transform(kind=kind, scale_stride=sizes[0] > 1, shift_stride=sizes[1] > 1)
    return ChainTransform(structure, shapes=shapes, features=features if features > 1 else None, places=(scale, shift))


def soft_clip_transform(bound: float) -> ChainTransform:
    """Returns the transform y = x / (1 + |x / bound|) of each feature."""
    return ChainTransform(Transform(kind=TransformKind.SOFT_CLIP, high=bound))


def lu_transform(lower: Place, upper: Place, diagonal: Place, shift: Place, min_scale: float) -> ChainTransform:
    """Returns the transform y = L U x + shift of D features.

    Args:
        lower: The place of the entries below the diagonal of L, row by row. Those on the diagonal are 1.
        upper: The place of the entries above the diagonal of U, row by row.
        diagonal: The place of d (D); the diagonal of U is softplus(d) + min_scale.
        shift: The place of the shift (D).
        min_scale: The least entry on the diagonal of U.
    """
    places = (lower, upper, diagonal, shift)
    shapes = [holder[name].shape for holder, name in places]
    features = shapes[-1].numel()
    entries = features * (features - 1) // 2
    if shapes != [(entries,), (entries,), (features,), (features,)]:
        raise UnsupportedError("L, U and a shift of other sizes")
    structure = Transform(kind=TransformKind.LU_LINEAR, features=features, min_scale=min_scale)
    return ChainTransform(structure, shapes=shapes, features=features, places=places)


def constant_transform(
    places: Sequence[Place], features: int, transformed: Sequence[int], **fields: Any
) -> ChainTransform:
    """Returns an elementwise transform of some of D features whose parameters are tensors.

    Args:
        places: The places of the tensors, (transformed, size) each: the two parameters of an affine transform, or the
            widths, the heights, the derivatives and, if it is rational linear, the lambdas of a spline.
        features: D.
        transformed: The features that are transformed, in the order of the tensors. The others stay as they are.
        fields: Those of `boundary.Transform` that describe the elementwise transform.
    """
    shapes = [holder[name].shape for holder, name in places]
    sizes = [shape.numel() / len(transformed) for shape in shapes]
    bins, is_linear = fields.get("bins", 0), fields["kind"] == TransformKind.RATIONAL_LINEAR
    if sizes != ([bins, bins, *([bins - 1, bins] if is_linear else sizes[2:3])] if bins else [1, 1]):
        raise UnsupportedError("parameters of other sizes")
    order = _integers([*(feature for feature in range(features) if feature not in transformed), *transformed])
    structure = Transform(
        features=features, parameters=int(sum(sizes)), identity=features - len(transformed),
        order=ctypes.addressof(order), **fields,
    )  # fmt: skip
    _check_parameters(structure)
    return ChainTransform(structure, order, shapes, features, places=places)


def masked_transform(network: MaskedNetwork, **fields: Any) -> ChainTransform:
    """Returns an elementwise transform of features whose parameters a masked network gives.

    Args:
        network: The network, which reads all features.
        fields: Those of `boundary.Transform` that describe the elementwise transform.
    """
    return _transform_by_network(network, find_order(network), 0, **fields)


def coupling_transform(
    network: MaskedNetwork, identity: Sequence[int], transformed: Sequence[int], **fields: Any
) -> ChainTransform:
    """Returns an elementwise transform of some features whose parameters a network gives from the others.

    Args:
        network: The network, which reads the features `identity`, in this order.
        identity: The features that stay as they are.
        transformed: The features that are transformed, in the order of the network's outputs.
        fields: Those of `boundary.Transform` that describe the elementwise transform.
    """
    return _transform_by_network(network, coupling_order(network, identity, transformed), len(identity), **fields)


def _transform_by_network(network: MaskedNetwork, order: Order, identity: int, **fields: Any) -> ChainTransform:
    """Returns a transform of features in this order; the first ones of it stay as they are."""
    features, parameters = len(order.features), network.outputs.shape[1]
    memory: list[Any] = [_integers(order.features), _integers(order.starts), *map(_integers, order.units[0])]
    of_order, of_starts, of_rows, of_ready = map(ctypes.addressof, memory)
    table = (Operation * len(network.operations))(*network.operations)
    structure = Transform(
        steps=len(order.starts) - 1, num_operations=len(table), features=features, parameters=parameters,
        identity=identity, inputs=network.inputs,
        context=len(network.context_columns), context_start=network.context_columns.start, order=of_order,
        starts=of_starts, input_rows=of_rows, input_ready=of_ready, operations=ctypes.addressof(table), **fields,
    )  # fmt: skip
    _check_parameters(structure)
    for operation, mask, units in zip(table, network.masks, order.units[1:], strict=True):
        rows, ready = map(_integers, units)
        operation.rows, operation.ready = ctypes.addressof(rows), ctypes.addressof(ready)
        memory += [rows, ready]
        if mask is not None and not _reads_all(mask, units, order.units[operation.source]):
            memory.append(mask.contiguous())
            operation.mask = address_of(memory[-1])
    return ChainTransform(structure, (table, memory), network.shapes, features, network.context, network.places)


def _check_parameters(t: Transform) -> None:
    """Checks that each feature has as many parameters as the kind of transform reads."""
    if t.kind in (TransformKind.RATIONAL_QUADRATIC, TransformKind.RATIONAL_LINEAR):
        derivatives = {
            SplineBoundary.FIXED: t.bins - 1,
            SplineBoundary.FREE: t.bins + 1,
            SplineBoundary.CIRCULAR: t.bins,
        }[SplineBoundary(t.boundary)]
        lambdas = t.bins if t.kind == TransformKind.RATIONAL_LINEAR else 0
        fits = (
            t.bins > 0 and t.parameters == 2 * t.bins + derivatives + lambdas
            and max(t.min_width, t.min_height) * t.bins < 1
            and (not lambdas or t.boundary == SplineBoundary.FIXED)
        )  # fmt: skip
    elif t.kind == TransformKind.BERNSTEIN:
        fits = t.bins == t.parameters + 5 and t.parameters > 1 and t.bins <= _MAX_COEFFICIENTS
    elif t.kind == TransformKind.SUM_OF_SQUARES:  # a shift, and the coefficients of polynomials
        fits = t.bins > 0 and t.bins % 2 == 1 and t.parameters > 1 and 2 * (t.parameters - 1) % (t.bins + 1) == 0
    else:
        fits = t.parameters == 2
    if not fits:
        raise UnsupportedError("parameters of other sizes")


def _reads_all(mask: Bool[Tensor, "o i"], units: Units, inputs: Units) -> bool:
    """Returns True if each unit reads all inputs that its step can compute, so that no mask is needed."""
    (rows, ready), (_, ready_inputs) = units, inputs
    num_inputs = np.repeat(ready_inputs, np.diff(ready, prepend=0))
    return bool((mask.numpy().sum(axis=1)[rows[: len(num_inputs)]] == num_inputs).all())


def _integers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int32]:
    return (ctypes.c_int32 * len(values))(*values)
