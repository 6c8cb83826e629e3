"""nflows, and the copy of it in glasflow: `AutoregressiveTransform`, affine, spline or a user's own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from inspect import unwrap
from types import ModuleType
from typing import Any

from torch import nn

from jacobiflow.adapters.adapter import Adapter
from jacobiflow.adapters.library_module import library_class
from jacobiflow.adapters.made import AcceleratedComposition, AcceleratedTransform, made_transform, spline_transform
from jacobiflow.errors import UnsupportedError
from jacobiflow.native.boundary import ScaleActivation, TransformKind
from jacobiflow.native.transforms import ChainTransform, affine_transform, invert_transforms, permutation_transform


def make_adapters(nf: ModuleType) -> tuple[Adapter, ...]:
    """Returns the adapters of the package `nflows.transforms`, or of a copy of it."""
    list_of_nf = partial(list_transforms, nf)
    methods = ("forward", "inverse")
    return (
        Adapter(nf.autoregressive.AutoregressiveTransform, ("inverse",), AcceleratedTransform, list_of_nf),
        Adapter(nf.CompositeTransform, methods, AcceleratedComposition, list_of_nf, True, "_transforms"),
    )


def list_transforms(nf: ModuleType, module: Any, is_conditional: bool) -> Iterator[ChainTransform]:
    """Yields the transforms of a module, see `ListTransforms`; `nf` is that of `make_adapters`."""
    kind: Any = library_class(module)
    if kind is nf.CompositeTransform:
        for part in module._transforms:
            yield from list_transforms(nf, part, is_conditional)
    elif kind is nf.InverseTransform:
        yield from invert_transforms(list_transforms(nf, module._transform, is_conditional))
    elif kind is nf.MaskedAffineAutoregressiveTransform:
        _check_scale_activation(module, unwrap(kind.__init__).__code__.co_consts)
        scale: dict[str, Any] = {"scale_activation": ScaleActivation.SOFTPLUS, "min_scale": module._epsilon}
        yield made_transform(module, nf.made, is_conditional, TransformKind.MASKED_AFFINE, **scale)
    elif kind is nf.MaskedPiecewiseRationalQuadraticAutoregressiveTransform:
        yield spline_transform(module, nf.made, is_conditional)
    elif kind in (nf.Permutation, nf.RandomPermutation, nf.ReversePermutation) and module._dim == 1:
        yield permutation_transform(module._permutation.tolist())
    elif kind in (nf.PointwiseAffineTransform, nf.AffineTransform):
        yield affine_transform((module._buffers, "_scale"), (module._buffers, "_shift"))
    else:
        raise UnsupportedError(kind.__name__)


def _check_scale_activation(module: nn.Module, defaults: tuple[Any, ...]) -> None:
    """Raises UnsupportedError for a function of the user. Only glasflow takes one; `defaults` has its own code."""
    function = vars(module).get("scale_activation")
    if function is not None and getattr(function, "__code__", function) not in defaults:
        raise UnsupportedError(f"the scale_activation {getattr(function, '__name__', type(function).__name__)}")
