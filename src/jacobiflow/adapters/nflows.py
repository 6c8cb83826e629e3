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
from jacobiflow.adapters.made import AcceleratedComposition, AcceleratedTransform, made_transform, spline_transform
from jacobiflow.errors import UnsupportedError
from jacobiflow.native.boundary import ScaleActivation, TransformKind
from jacobiflow.native.transforms import ChainTransform, affine_transform, invert_transforms, permutation_transform


def list_transforms(module: Any, is_conditional: bool) -> Iterator[ChainTransform]:
    """Yields the transforms of a module of nflows, see `ListTransforms`."""
    kind: Any = library_class(module)
    if kind is CompositeTransform:
        for part in module._transforms:
            yield from list_transforms(part, is_conditional)
    elif kind is InverseTransform:
        yield from invert_transforms(list_transforms(module._transform, is_conditional))
    elif kind is MaskedAffineAutoregressiveTransform:
        scale: dict[str, Any] = {"scale_activation": ScaleActivation.SOFTPLUS, "min_scale": module._epsilon}
        yield made_transform(module, made, is_conditional, TransformKind.MASKED_AFFINE, **scale)
    elif kind is MaskedPiecewiseRationalQuadraticAutoregressiveTransform:
        yield spline_transform(module, made, is_conditional)
    elif kind in (Permutation, RandomPermutation, ReversePermutation) and module._dim == 1:
        yield permutation_transform(module._permutation.tolist())
    elif kind in (PointwiseAffineTransform, AffineTransform):
        yield affine_transform((module._buffers, "_scale"), (module._buffers, "_shift"))
    else:
        raise UnsupportedError(kind.__name__)


ADAPTERS: tuple[Adapter, ...] = (
    Adapter(AutoregressiveTransform, ("inverse",), AcceleratedTransform, list_transforms),
    Adapter(CompositeTransform, ("forward", "inverse"), AcceleratedComposition, list_transforms, is_composition=True),
)
