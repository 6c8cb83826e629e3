"""zuko: the masked transforms of its autoregressive flows, and the couplings of NICE."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import AffineTransform, Transform
from torch.distributions.transforms import _InverseTransform
from zuko.distributions import DiagNormal, NormalizingFlow
from zuko.flows import SOSPF, polynomial
from zuko.flows.autoregressive import MaskedAutoregressiveTransform
from zuko.flows.coupling import GeneralCouplingTransform
from zuko.flows.gaussianization import ElementWiseTransform
from zuko.flows.neural import MNN, UMNN
from zuko.flows.spline import CircularRQSTransform
from zuko.lazy import Flow, LazyComposedTransform, LazyInverse, UnconditionalDistribution, UnconditionalTransform
from zuko.nn import MLP, Linear, MaskedLinear, MaskedMLP, Residual
from zuko.transforms import (
    AutoregressiveTransform,
    BoundedBernsteinTransform,
    ComposedTransform,
    CouplingTransform,
    MonotonicAffineTransform,
    MonotonicRQSTransform,
    MonotonicTransform,
    PermutationTransform,
    SoftclipTransform,
)
from zuko.utils import broadcast, unpack

from jacobiflow.adapters.adapter import AcceleratedModule, Adapter
from jacobiflow.adapters.library_module import default_of, is_accelerated, library_class, shallow_copy
from jacobiflow.adapters.native_module import TransformOutput
from jacobiflow.adapters.network import LibraryNetwork
from jacobiflow.adapters.passes import invert_by_passes
from jacobiflow.adapters.root import find_root
from jacobiflow.errors import UnsupportedError
from jacobiflow.native.boundary import ScaleActivation, SplineBoundary, TransformKind
from jacobiflow.native.masked_network import Place
from jacobiflow.native.transforms import (
    ChainTransform,
    affine_transform,
    constant_transform,
    coupling_transform,
    invert_transforms,
    masked_transform,
    permutation_transform,
    soft_clip_transform,
)

# The sums of squares of zuko before 1.6 have no minimum slope, and stay zuko's.
_SUM_OF_SQUARES = getattr(polynomial, "ShiftedSOSPTransform", None) if "slope" in signature(SOSPF).parameters else None


def list_transforms(module: Any, is_conditional: bool) -> Iterator[ChainTransform]:
    """Yields the transforms of a zuko module, see `ListTransforms`."""
    kind = library_class(module)
    if issubclass(kind, Flow):
        yield from list_transforms(module.transform, is_conditional)
        loc, scale = _normal_base(module.base)
        yield affine_transform(scale, loc, TransformKind.NORMAL)
    elif kind is LazyComposedTransform:
        for part in module.transforms:
            yield from list_transforms(part, is_conditional)
    elif kind is LazyInverse:
        yield from invert_transforms(list_transforms(module.transform, is_conditional))
    elif kind is UnconditionalTransform:
        yield _unconditional_transform(module)
    elif kind is MaskedAutoregressiveTransform:
        yield _autoregressive_transform(module)
    elif kind is GeneralCouplingTransform:
        identity, transformed = (mask.nonzero().flatten().tolist() for mask in (module.mask, ~module.mask))
        yield _coupling_transform(module, identity, transformed)
    elif kind is ElementWiseTransform:
        yield _elementwise_transform(module, is_conditional)
    else:
        raise UnsupportedError(kind.__name__)


def _autoregressive_transform(module: Any) -> ChainTransform:
    if type(module.hyper) is not MaskedMLP:
        raise UnsupportedError(f"the network {type(module.hyper).__name__}")
    outputs = torch.arange(module.hyper[-1].out_features, device="cpu").view(-1, module.total)
    network = LibraryNetwork(outputs, context_columns=range(len(outputs), module.hyper[0].in_features))
    network.add_layers(0, module.hyper, (MaskedLinear, Linear), Residual)
    return masked_transform(network, **_univariate_fields(module.univariate, list(module.shapes)))


def _coupling_transform(module: Any, identity: Sequence[int], transformed: Sequence[int]) -> ChainTransform:
    if type(module.hyper) is not MLP:
        raise UnsupportedError(f"the network {type(module.hyper).__name__}")
    outputs = torch.arange(len(transformed) * module.total, device="cpu").view(-1, module.total)
    network = LibraryNetwork(outputs, range(len(identity), module.hyper.in_features), len(identity))
    network.add_layers(0, module.hyper, (MaskedLinear, Linear), Residual)
    fields = _univariate_fields(module.univariate, list(module.shapes))
    return coupling_transform(network, identity, transformed, **fields)


def _elementwise_transform(module: Any, is_conditional: bool) -> ChainTransform:
    """Returns a transform whose parameters depend on the context only, or are tensors."""
    if "hyper" in module._modules:
        return _coupling_transform(module, [], range(module.hyper.out_features // module.total))
    if is_conditional:
        raise UnsupportedError("a context for parameters that depend on none")
    places = [(module.phi._parameters, name) for name in module.phi._parameters]
    features = len(module.phi[0])
    fields = _univariate_fields(module.univariate, list(module.shapes))
    return constant_transform(places, features, range(features), **fields)


def _univariate_fields(univariate: Any, shapes: list[Any]) -> dict[str, Any]:
    """Returns the native fields of an elementwise transform, given its constructor and its parameters' shapes."""
    settings: dict[str, Any] = {}
    if isinstance(univariate, partial) and not univariate.args:
        univariate, settings = univariate.func, dict(univariate.keywords)

    def read_settings(**functions: Any) -> list[Any]:
        """Returns the settings of these names, or the defaults of these functions."""
        numbers = [settings.pop(name, default_of(function, name)) for name, function in functions.items()]
        if settings or not all(isinstance(number, int | float) for number in numbers):
            raise UnsupportedError(f"the settings of {_name_of(univariate)}")
        return numbers

    match [tuple(shape) for shape in shapes]:
        case [(), ()] if univariate is MonotonicAffineTransform:
            (slope,) = read_settings(slope=univariate)
            return {
                "kind": TransformKind.MASKED_AFFINE, "scale_activation": ScaleActivation.SOFT_CLIPPED_EXP,
                "scale_index": 1, "clip": _clip(slope),
            }  # fmt: skip
        case [(bins,), (heights,), (inner,)] if heights == bins == inner + 1 and univariate is MonotonicRQSTransform:
            slope, bound = read_settings(slope=univariate, bound=univariate)
            return _spline_fields(bins, slope, bound) | {"has_tails": True}
        case [(bins,), (heights,), (inner,)] if heights == bins == inner + 1 and univariate is CircularRQSTransform:
            (slope,) = read_settings(slope=univariate)
            return _spline_fields(bins, slope, math.pi) | {"is_circular": True}
        case [(count,)] if univariate is BoundedBernsteinTransform:
            bound, eps = read_settings(bound=univariate, eps=MonotonicTransform)
            return {
                "kind": TransformKind.BERNSTEIN, "bins": count + 5, "high": bound, "edge_margin": 2 * bound * eps,
            }  # fmt: skip
        case [(_, terms), ()] if univariate is _SUM_OF_SQUARES:
            (slope,) = read_settings(slope=univariate)
            return {
                "kind": TransformKind.SUM_OF_SQUARES, "bins": 2 * terms - 1, "min_slope": slope,
                "high": default_of(MonotonicTransform, "bound"),
            }  # fmt: skip
    raise UnsupportedError(f"the univariate {_name_of(univariate)}")


def _clip(slope: float) -> float:
    """Returns the factor of a soft clip that ends at slopes of `slope` and 1 / `slope`."""
    if not 0 < slope < 1:
        raise UnsupportedError(f"the slope {slope}")
    return -1 / math.log(slope)


def _spline_fields(bins: int, slope: float, bound: float) -> dict[str, Any]:
    return {
        "kind": TransformKind.RATIONAL_QUADRATIC, "bins": bins, "boundary": SplineBoundary.FIXED, "end_slope": 1.0,
        "is_soft_clipped": True, "clip": _clip(slope), "logit_scale": 1.0, "low": -bound, "high": bound,
    }  # fmt: skip


def _has_event_dim_0(module: Any) -> bool:
    """Returns True if zuko's log-determinant of a module is one for each feature, not their sum."""
    if isinstance(module, LazyInverse):
        return _has_event_dim_0(module.transform)
    if isinstance(module, LazyComposedTransform):
        return all(map(_has_event_dim_0, module.transforms))
    return isinstance(module, UnconditionalTransform) and module.f in (AffineTransform, SoftclipTransform)


def _unconditional_transform(module: Any) -> ChainTransform:
    """Returns a permutation, a soft clip, or an affine transform whose scale and shift are parameters."""
    if module.f is PermutationTransform and module._nargs == 1 and len(module._buffers) == 1:
        (order,) = module._buffers.values()
        return permutation_transform(order.tolist())
    if module.f is SoftclipTransform and module._keys == ["bound"] and isinstance(module.bound, int | float):
        return soft_clip_transform(module.bound)
    if module.f is AffineTransform:
        loc, scale = _location_scale(module)
        return affine_transform(scale, loc)
    raise UnsupportedError(f"UnconditionalTransform of {_name_of(module.f)}")


def _normal_base(module: Any) -> list[Place]:
    """Returns the location and the scale of a base, if it is a normal distribution."""
    if type(module) is not UnconditionalDistribution:
        raise UnsupportedError(f"the base {type(module).__name__}")
    if module.f is not DiagNormal:
        raise UnsupportedError(f"the base {_name_of(module.f)}")
    return _location_scale(module)


def _location_scale(module: Any) -> list[Place]:
    """Returns the arguments of a lazy module, if these are a location and a scale for all features or for each."""
    holder = module._buffers or module._parameters
    if module._nargs + len(module._keys) == 2 and [*holder] in (["loc", "scale"], ["_0", "_1"]):
        loc, scale = holder.values()
        if loc.ndim < 2 and scale.ndim < 2:
            return [(holder, name) for name in holder]
    raise UnsupportedError(f"the arguments of {_name_of(module.f)}")


def _name_of(constructor: Any) -> str:
    """Returns the name of a function or class, or the class of another callable."""
    return getattr(constructor, "__name__", type(constructor).__name__)


def _has_networks_of_features(module: Any) -> bool:
    """Returns True if each feature has a monotone network of its own, as in NAF and UNAF."""
    kind: Any = library_class(module)
    if kind.meta is not MaskedAutoregressiveTransform.meta:  # The search calls the networks without it.
        return False
    if type(module.univariate) not in (MNN, UMNN) or module.order is None:
        return False
    return all(layer.weight.ndim == 3 for layer in module.univariate.modules() if isinstance(layer, Linear))


def _search_features(module: Any, y: Tensor, context: Tensor | None) -> Tensor:
    """Inverts step by step, and searches only the features of a step."""
    if context is not None:
        y, context = broadcast(y, context, ignore=1)
    x, bound = torch.zeros_like(y), default_of(MonotonicTransform, "bound")
    for step in range(module.passes):
        features = (module.order == step).nonzero().flatten()
        inputs = x if context is None else torch.cat([x, context], dim=-1)
        parameters = module.hyper(inputs).unflatten(-1, (-1, module.total))[..., features, :]
        transform = _select_features(module.univariate, features)(*unpack(parameters, module.shapes))
        x[..., features] = find_root(transform, y[..., features], bound)
    return x


def _select_features(networks: nn.Module, features: Tensor) -> nn.Module:
    """Returns a copy of the networks of all features that has only those of some."""
    if isinstance(networks, Linear):
        parameters = {name: None if each is None else each[features] for name, each in networks._parameters.items()}
        return shallow_copy(networks, type(networks), _parameters=parameters)
    parts = {name: _select_features(part, features) for name, part in networks._modules.items() if part is not None}
    return shallow_copy(networks, type(networks), _modules=parts)


class _AcceleratedTransform(Transform):
    """A transform that an accelerated lazy transform gives; zuko's own after `restore`.

    Attributes:
        module: The lazy transform.
        is_inverse: Whether this is the inverse of the module's transform.
    """

    module: Any
    context: Tensor | None
    is_inverse: bool = False

    def _evaluate(self, x: Tensor, is_inverse: bool, log_det: str | None = None) -> Any:
        """Returns the output of the module's transform or its inverse; `None` if it is left to zuko."""
        module = self.module
        if not is_accelerated(module):
            return None

        def library_call(module: Any, x: Tensor, context: Tensor | None) -> TransformOutput:
            transform = library_class(module).forward(module, context)
            transform = transform.inv if is_inverse else transform
            return (transform(x), None) if log_det is None else transform.call_and_ladj(x)

        return module.acceleration.evaluate(module, x, self.context, is_inverse, library_call, log_det)

    def _call(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        result = self._evaluate(x, self.is_inverse)
        return super()._call(x) if result is None else result[0]

    def call_and_ladj(self, x: Float[Tensor, "*batch d"]) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch"]]:
        """Returns y and the logarithm of the Jacobian's determinant."""
        result = self._evaluate(x, self.is_inverse, "rows")
        return super().call_and_ladj(x) if result is None else result  # type: ignore[misc]


class _AcceleratedLayer(_AcceleratedTransform):
    """A transform of one layer at a context. Copies and pickles are of zuko's class."""

    @property
    def inv(self) -> AcceleratedInverse:
        """The inverse."""
        return AcceleratedInverse(self)

    def _inverse(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        result = self._evaluate(y, is_inverse=True)
        if result is None and is_accelerated(self.module):
            result = self._invert_by_passes(y)
        return super()._inverse(y) if result is None else result[0]

    def _invert_by_passes(self, y: Tensor) -> Any:
        """Returns the inverse without native code in a tuple; `None` if it is left to zuko."""
        return None


class AcceleratedCoupling(_AcceleratedLayer, CouplingTransform):  # type: ignore[misc]
    """A coupling at a context."""

    def __reduce__(self) -> tuple[Any, ...]:
        return CouplingTransform, (self.meta, self.module.mask)


class AcceleratedAutoregressive(_AcceleratedLayer, AutoregressiveTransform):  # type: ignore[misc]
    """A masked transform at a context."""

    def __reduce__(self) -> tuple[Any, ...]:
        return AutoregressiveTransform, (self.meta, self.passes)

    def _invert_by_passes(self, y: Tensor) -> Any:
        module, context = self.module, self.context

        def step(module: Any, x: Tensor) -> tuple[Tensor]:
            return (module.meta(context, x).inv(y),)

        search = partial(_search_features, y=y, context=context) if _has_networks_of_features(module) else None
        return invert_by_passes(module.acceleration, module, step, module, y, context, self.passes, search)


class AcceleratedInverse(_InverseTransform):
    """The inverse of a masked transform at a context. Copies and pickles are of PyTorch's class."""

    _inv: Any

    def __reduce__(self) -> tuple[Any, ...]:
        return _InverseTransform, (self._inv,)

    def call_and_ladj(self, y: Float[Tensor, "*batch d"]) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch"]]:
        """Returns x and the logarithm of the determinant of the inverse's Jacobian."""
        result = self._inv._evaluate(y, is_inverse=True, log_det="rows")
        return super().call_and_ladj(y) if result is None else result  # type: ignore[misc]


class AcceleratedComposed(_AcceleratedTransform, ComposedTransform):  # type: ignore[misc]
    """A composition at a context, or its inverse. Native code computes its transforms together.

    zuko's own transforms are made when they are needed. Copies and pickles are of zuko's class.
    """

    def __init__(self, module: AcceleratedModule, context: Tensor | None, is_inverse: bool = False) -> None:
        Transform.__init__(self)
        self.module, self.context, self.is_inverse = module, context, is_inverse

    def __reduce__(self) -> tuple[Any, ...]:
        return ComposedTransform, tuple(self.transforms)

    def __getattr__(self, name: str) -> Any:
        if name not in ("transforms", "domain_dim", "codomain_dim"):
            raise AttributeError(name)
        transform = library_class(self.module).forward(self.module, self.context)
        self.__dict__.update(vars(transform.inv if self.is_inverse else transform))
        return vars(self)[name]

    @property
    def inv(self) -> AcceleratedComposed:
        """The inverse."""
        return AcceleratedComposed(self.module, self.context, not self.is_inverse)

    def call_and_ladj(self, x: Float[Tensor, "*batch d"]) -> tuple[Float[Tensor, "*batch d"], Tensor]:
        """Returns y and the logarithm of the Jacobian's determinant, by feature if no transform mixes features."""
        if _has_event_dim_0(self.module):
            return ComposedTransform.call_and_ladj(self, x)
        return super().call_and_ladj(x)


class AcceleratedNormalizingFlow(NormalizingFlow):  # type: ignore[misc]
    """A flow at a context. Its transform and base are made when they are needed. Copies are of zuko's class.

    It has no constructor of its own, as zuko's `expand` refuses those. An expanded flow has no module, so it is zuko's.
    """

    module: Any = None
    context: Tensor | None

    def __reduce__(self) -> tuple[Any, ...]:
        return NormalizingFlow, (self.transform, self.base)

    def __getattr__(self, name: str) -> Any:
        if name == "transform":
            self.transform = self.module.transform(self.context)
        elif name in ("base", "reinterpreted"):
            flow = library_class(self.module).forward(self.module, self.context)
            self.base, self.reinterpreted = flow.base, flow.reinterpreted
        else:
            raise AttributeError(name)
        return vars(self)[name]

    def rsample(self, shape: Any = ()) -> Float[Tensor, "*batch d"]:
        """Returns samples."""
        module = self.module
        if not is_accelerated(module):
            return super().rsample(shape)

        def library_call(module: Any, z: Tensor, context: Tensor | None) -> TransformOutput:
            return library_class(module).forward(module, context).transform.inv(z), None

        try:
            loc, scale = [holder[name] for holder, name in _normal_base(module.base)]
        except UnsupportedError:
            return super().rsample(shape)
        batch = () if self.context is None else self.context.shape[:-1]
        features = max(loc.numel(), scale.numel())
        noise = torch.randn(*shape, *batch, features, dtype=loc.dtype, device=loc.device)
        z = loc + noise * scale  # the numbers that zuko's base draws
        result = module.acceleration.evaluate(module, z, self.context, True, library_call)
        return self.transform.inv(z) if result is None else result[0]

    def log_prob(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Returns the log-density of x."""
        module = self.module
        if not is_accelerated(module):
            return super().log_prob(x)

        def library_call(module: Any, x: Tensor, context: Tensor | None) -> TransformOutput:
            return x, library_class(module).forward(module, context).log_prob(x)

        result = module.acceleration.evaluate(module, x, self.context, False, library_call, "rows")
        return super().log_prob(x) if result is None else result[1]


class AcceleratedLazyTransform(AcceleratedModule):
    """A lazy masked or coupling transform."""

    def forward(self, c: Tensor | None = None) -> _AcceleratedLayer:
        transform = super().forward(c)
        is_coupling = isinstance(transform, CouplingTransform)
        transform.__class__ = AcceleratedCoupling if is_coupling else AcceleratedAutoregressive
        transform.module, transform.context = self, c
        return transform


class AcceleratedLazyComposed(AcceleratedModule):
    """A lazy composition."""

    def forward(self, c: Tensor | None = None) -> AcceleratedComposed:
        return AcceleratedComposed(self, c)


class AcceleratedFlow(AcceleratedModule):
    """A lazy flow. Native code computes the density together with that of a normal base."""

    def forward(self, c: Tensor | None = None) -> AcceleratedNormalizingFlow:
        flow = AcceleratedNormalizingFlow.__new__(AcceleratedNormalizingFlow)
        flow.module, flow.context = self, c
        return flow


ADAPTERS: tuple[Adapter, ...] = (
    Adapter(
        MaskedAutoregressiveTransform,
        ("forward",),
        AcceleratedLazyTransform,
        list_transforms,
        has_search=_has_networks_of_features,
    ),
    Adapter(GeneralCouplingTransform, ("forward",), AcceleratedLazyTransform, list_transforms, needs_native=True),
    Adapter(ElementWiseTransform, (), AcceleratedModule, list_transforms, needs_native=True),
    Adapter(LazyComposedTransform, ("forward",), AcceleratedLazyComposed, list_transforms, True, "transforms"),
    Adapter(Flow, ("forward",), AcceleratedFlow, list_transforms, is_composition=True),
)
