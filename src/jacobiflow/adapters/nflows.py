"""nflows, and the copy of it in glasflow: couplings, and `AutoregressiveTransform`, affine, spline or a user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import unwrap
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from jacobiflow.adapters.adapter import Adapter
from jacobiflow.adapters.library_module import library_class
from jacobiflow.adapters.made import (
    AcceleratedComposition,
    AcceleratedTransform,
    constant_spline,
    lu_layer_transform,
    made_transform,
    places_of,
    residual_coupling,
    spline_coupling,
    spline_transform,
)
from jacobiflow.adapters.network import find_identical
from jacobiflow.errors import UnsupportedError
from jacobiflow.native.boundary import ScaleActivation, TransformKind
from jacobiflow.native.transforms import (
    ChainTransform,
    affine_transform,
    constant_transform,
    invert_transforms,
    permutation_transform,
)

SIGMOID_SCALE = {"scale_activation": ScaleActivation.SIGMOID, "logit_shift": 2.0}
WIDE_SCALE = {"scale_activation": ScaleActivation.SOFTPLUS, "max_scale": 3.0}


@dataclass(frozen=True)
class Library:
    """nflows, or a copy of it.

    Attributes:
        transforms: The package `nflows.transforms`.
        residual_nets: ResidualNet, and the class of its blocks.
        affine_couplings: The classes of affine couplings.
        scales: The functions that make a scale of a parameter, with their native fields. nflows' couplings have none.
    """

    transforms: ModuleType
    residual_nets: Sequence[type[nn.Module]]
    affine_couplings: tuple[type[nn.Module], ...]
    scales: Mapping[Callable[..., Tensor] | None, Mapping[str, Any]]


def make_adapters(library: Library) -> tuple[Adapter, ...]:
    """Returns the adapters of nflows, or of a copy of it."""
    nf, list_of_nf = library.transforms, partial(list_transforms, library)
    methods = ("forward", "inverse")
    return (
        Adapter(nf.coupling.CouplingTransform, methods, AcceleratedComposition, list_of_nf, needs_native=True),
        Adapter(nf.autoregressive.AutoregressiveTransform, ("inverse",), AcceleratedTransform, list_of_nf),
        Adapter(nf.CompositeTransform, methods, AcceleratedComposition, list_of_nf, True, "_transforms"),
    )


def list_transforms(library: Library, module: Any, is_conditional: bool) -> Iterator[ChainTransform]:
    """Yields the transforms of a module, see `ListTransforms`."""
    kind: Any = library_class(module)
    nf = library.transforms
    if kind is nf.CompositeTransform:
        for part in module._transforms:
            yield from list_transforms(library, part, is_conditional)
    elif kind is nf.InverseTransform:
        yield from invert_transforms(list_transforms(library, module._transform, is_conditional))
    elif kind is nf.MaskedAffineAutoregressiveTransform:
        function = vars(module).get("scale_activation")  # of glasflow, made by the constructor unless a user gives one
        if (
            function is not None
            and getattr(function, "__code__", function) not in unwrap(kind.__init__).__code__.co_consts
        ):
            raise UnsupportedError(f"the scale_activation {getattr(function, '__name__', type(function).__name__)}")
        scale: dict[str, Any] = {"scale_activation": ScaleActivation.SOFTPLUS, "min_scale": module._epsilon}
        yield made_transform(module, nf.made, is_conditional, kind=TransformKind.MASKED_AFFINE, **scale)
    elif kind is nf.MaskedPiecewiseRationalQuadraticAutoregressiveTransform:
        yield spline_transform(module, nf.made, is_conditional)
    elif kind in (*library.affine_couplings, nf.PiecewiseRationalQuadraticCouplingTransform):
        if kind in library.affine_couplings:
            yield _affine_coupling(library, module, is_conditional)
        else:
            yield spline_coupling(module, library.residual_nets, is_conditional)
        identity = module.identity_features.tolist()
        if module.unconditional_transform is not None and identity:
            yield _constant_transform(nf, module.unconditional_transform, module.features, identity)
    elif kind in (nf.ActNorm, nf.PiecewiseRationalQuadraticCDF):
        features = len(next(module.parameters()))
        yield _constant_transform(nf, module, features, range(features))
    elif kind is nf.BatchNorm:
        yield from _batch_norm_transforms(module)
    elif kind is nf.LULinear:
        yield lu_layer_transform(module)
    elif kind in (nf.Permutation, nf.RandomPermutation, nf.ReversePermutation) and module._dim == 1:
        yield permutation_transform(module._permutation.tolist())
    elif kind in (nf.PointwiseAffineTransform, nf.AffineTransform):
        yield affine_transform((module._buffers, "_scale"), (module._buffers, "_shift"))
    else:
        raise UnsupportedError(kind.__name__)


def _affine_coupling(library: Library, module: Any, is_conditional: bool) -> ChainTransform:
    function = vars(module).get("scale_activation")
    scale = find_identical(library.scales, function)
    if scale is None:
        raise UnsupportedError(f"the scale_activation {getattr(function, '__name__', type(function).__name__)}")
    outputs = torch.arange(2 * len(module.transform_features), device="cpu").view(2, -1).t()  # shifts before scales
    fields: dict[str, Any] = {"kind": TransformKind.MASKED_AFFINE, "min_scale": 1e-3, "scale_index": 1}
    return residual_coupling(module, library.residual_nets, outputs, is_conditional, **fields, **scale)


def _constant_transform(nf: ModuleType, module: Any, features: int, transformed: Sequence[int]) -> ChainTransform:
    """Returns a transform of some of the features whose parameters are tensors."""
    kind = library_class(module)
    if kind is nf.ActNorm:
        fields: dict[str, Any] = {"kind": TransformKind.MASKED_AFFINE, "scale_activation": ScaleActivation.EXP}
        return constant_transform(places_of(module, "log_scale", "shift"), features, transformed, **fields)
    if kind is nf.PiecewiseRationalQuadraticCDF:
        return constant_spline(module, features, transformed)
    raise UnsupportedError(f"the unconditional transform {kind.__name__}")


def _batch_norm_transforms(module: Any) -> Iterator[ChainTransform]:
    """Yields (x - running_mean) / sqrt(running_var + eps), and the affine transform after it, as in evaluation mode."""
    features = range(len(module.bias))
    statistics = [(module._buffers, "running_var"), (module._buffers, "running_mean")]
    root: dict[str, Any] = {"scale_activation": ScaleActivation.SQUARE_ROOT, "parametrizes_inverse": True}
    scale: dict[str, Any] = {"scale_activation": ScaleActivation.SOFTPLUS}
    for places, fields in ((statistics, root), (places_of(module, "unconstrained_weight", "bias"), scale)):
        fields |= {"kind": TransformKind.MASKED_AFFINE, "min_scale": module.eps}
        yield constant_transform(places, len(features), features, **fields)
