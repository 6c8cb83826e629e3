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

from jacobiflow.adapters.adapter import Adapter
from jacobiflow.adapters.library_module import library_class
from jacobiflow.adapters.made import AcceleratedComposition, AcceleratedTransform, made_spec, spline_spec
from jacobiflow.adapters.native_module import TransformSpec, affine_spec
from jacobiflow.errors import UnsupportedError
from jacobiflow.native.boundary import ScaleActivation, TransformKind
from jacobiflow.native.transforms import permutation_transform


def list_transforms(
    module: Any, is_conditional: bool, is_inverted: bool = False
) -> Iterator[tuple[TransformSpec, bool]]:
    """Yields the transforms of a module of nflows, see `ListTransforms`."""
    kind: Any = library_class(module)
    if kind is CompositeTransform:
        for part in reversed(module._transforms) if is_inverted else module._transforms:
            yield from list_transforms(part, is_conditional, is_inverted)
    elif kind is InverseTransform:
        yield from list_transforms(module._transform, is_conditional, not is_inverted)
    else:
        yield _transform_spec(module, kind, is_conditional), is_inverted


def _transform_spec(module: Any, kind: Any, is_conditional: bool) -> TransformSpec:
    if kind is MaskedAffineAutoregressiveTransform:
        scale: dict[str, Any] = {"scale_activation": ScaleActivation.SOFTPLUS, "min_scale": module._epsilon}
        return made_spec(module, made, is_conditional, TransformKind.MASKED_AFFINE, **scale)
    if kind is MaskedPiecewiseRationalQuadraticAutoregressiveTransform:
        return spline_spec(module, made, is_conditional)
    if kind in (Permutation, RandomPermutation, ReversePermutation) and module._dim == 1:
        return TransformSpec(permutation_transform(module._permutation.tolist()))
    if kind in (PointwiseAffineTransform, AffineTransform):
        return affine_spec((module._buffers, "_scale"), (module._buffers, "_shift"))
    raise UnsupportedError(kind.__name__)


ADAPTERS: tuple[Adapter, ...] = (
    Adapter(AutoregressiveTransform, ("inverse",), AcceleratedTransform, list_transforms),
    Adapter(CompositeTransform, ("forward", "inverse"), AcceleratedComposition, list_transforms, is_composition=True),
)
