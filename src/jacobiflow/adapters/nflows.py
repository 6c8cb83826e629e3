"""nflows: `AutoregressiveTransform`, affine, spline or a user's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nflows.transforms import made
from nflows.transforms.autoregressive import (
    AutoregressiveTransform,
    MaskedAffineAutoregressiveTransform,
    MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
)
from nflows.transforms.base import CompositeTransform, InverseTransform
from nflows.transforms.permutations import Permutation, RandomPermutation, ReversePermutation
from nflows.transforms.standard import AffineTransform, PointwiseAffineTransform

from jacobiflow.adapters.acceleration import Adapter, library_class
from jacobiflow.adapters.chain import Part, affine_part, permutation_part
from jacobiflow.adapters.made import AcceleratedComposition, AcceleratedTransform, made_part, spline_part
from jacobiflow.native.boundary import TransformKind, UnsupportedError


def describe(module: Any, is_conditional: bool, is_inverse: bool = False) -> Iterator[tuple[Part, bool]]:
    """See `Describe`."""
    kind: Any = library_class(module)
    if kind is CompositeTransform:
        for part in reversed(module._transforms) if is_inverse else module._transforms:
            yield from describe(part, is_conditional, is_inverse)
    elif kind is InverseTransform:
        yield from describe(module._transform, is_conditional, not is_inverse)
    else:
        yield _transform(module, kind, is_conditional), is_inverse


def _transform(module: Any, kind: Any, is_conditional: bool) -> Part:
    if kind is MaskedAffineAutoregressiveTransform:
        return made_part(module, made, is_conditional, TransformKind.SOFTPLUS_AFFINE, min_scale=module._epsilon)
    if kind is MaskedPiecewiseRationalQuadraticAutoregressiveTransform:
        return spline_part(module, made, is_conditional)
    if kind in (Permutation, RandomPermutation, ReversePermutation) and module._dim == 1:
        return permutation_part(module, module._permutation.tolist(), (module._buffers, "_permutation"))
    if kind in (PointwiseAffineTransform, AffineTransform):
        return affine_part(module, (module._buffers, "_scale"), (module._buffers, "_shift"))
    raise UnsupportedError(kind.__name__)


class Accelerated(AcceleratedTransform):
    """A masked transform of nflows."""

    library = made


ADAPTERS = (
    Adapter(AutoregressiveTransform, ("inverse",), Accelerated, describe),
    Adapter(CompositeTransform, ("forward", "inverse"), AcceleratedComposition, describe, is_composition=True),
)
