"""zuko: `MaskedAutoregressiveTransform`, the transform of MAF, NSF, NCSF, NAF, UNAF, SOSPF and BPF."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import AffineTransform, Transform
from torch.distributions.transforms import _InverseTransform
from zuko.distributions import DiagNormal, NormalizingFlow
from zuko.flows.autoregressive import MaskedAutoregressiveTransform
from zuko.flows.spline import CircularRQSTransform
from zuko.lazy import Flow, LazyComposedTransform, LazyInverse, UnconditionalDistribution, UnconditionalTransform
from zuko.nn import MaskedLinear, MaskedMLP, Residual
from zuko.transforms import (
    AutoregressiveTransform,
    ComposedTransform,
    MonotonicAffineTransform,
    MonotonicRQSTransform,
    PermutationTransform,
)

from jacobiflow.adapters.acceleration import AcceleratedModule, Adapter, is_accelerated, library_class
from jacobiflow.adapters.chain import Part, Values, affine_part, masked_part, normal_part, permutation_part
from jacobiflow.adapters.network import MaskedNetwork, Slot
from jacobiflow.adapters.passes import invert
from jacobiflow.native.boundary import SplineBoundary, TransformKind, UnsupportedError

if TYPE_CHECKING:
    from typing_extensions import Self


def describe(module: Any, is_conditional: bool, is_inverse: bool = False) -> Iterator[tuple[Part, bool]]:
    """See `Describe`."""
    kind = library_class(module)
    if issubclass(kind, Flow):
        yield from describe(module.transform, is_conditional)
        yield _base(module.base), False
    elif kind is LazyComposedTransform:
        for part in reversed(module.transforms) if is_inverse else module.transforms:
            yield from describe(part, is_conditional, is_inverse)
    elif kind is LazyInverse:
        yield from describe(module.transform, is_conditional, not is_inverse)
    elif kind is UnconditionalTransform:
        yield _unconditional(module), is_inverse
    elif kind is MaskedAutoregressiveTransform:
        yield _masked(module), is_inverse
    else:
        raise UnsupportedError(kind.__name__)


def _masked(module: Any) -> Part:
    if type(module.hyper) is not MaskedMLP:
        raise UnsupportedError(f"the network {type(module.hyper).__name__}")
    network = MaskedNetwork(torch.arange(module.hyper[-1].out_features, device="cpu").view(-1, module.total))
    _add_layers(network, 0, list(module.hyper))
    return masked_part(module, network, **_univariate(module.univariate, list(module.shapes)))


def _add_layers(network: MaskedNetwork, value: int, modules: list[nn.Module]) -> int:
    """Adds masked layers, activations and residual blocks, one after the other."""
    while modules:
        module, *modules = modules
        if type(module) is MaskedLinear:
            function = modules.pop(0) if modules and type(modules[0]) not in (MaskedLinear, Residual) else None
            value = network.linear(value, module, function)
        elif type(module) is Residual:
            value = network.sum(_add_layers(network, value, list(module.children())), value)
        else:
            value = network.activation(value, module)
    return value


def _univariate(univariate: Any, shapes: list[Any]) -> dict[str, Any]:
    """The elementwise transform of a masked transform, by its constructor and the shapes of its parameters."""
    settings: dict[str, Any] = {}
    if isinstance(univariate, partial) and not univariate.args:
        univariate, settings = univariate.func, dict(univariate.keywords)
    slope, bound = settings.pop("slope", 1e-3), settings.pop("bound", 5.0)
    clip = 1 / abs(math.log(slope))
    sizes = [tuple(shape) for shape in shapes]
    if settings or not all(isinstance(number, int | float) for number in (slope, bound)):
        raise UnsupportedError(f"the settings of {univariate.__name__}")
    if univariate is MonotonicAffineTransform and sizes == [(), ()]:
        return {"kind": TransformKind.SOFT_CLIPPED_AFFINE, "clip": clip}
    if univariate in (MonotonicRQSTransform, CircularRQSTransform) and len(sizes) == 3 and len(sizes[0]) == 1:
        (bins,), is_circular = sizes[0], univariate is CircularRQSTransform
        if sizes == [(bins,), (bins,), (bins - 1,)]:
            bound = math.pi if is_circular else bound
            return {
                "kind": TransformKind.RATIONAL_QUADRATIC, "bins": bins, "boundary": SplineBoundary.FIXED,
                "end_slope": 1.0, "is_soft_clipped": True, "clip": clip, "logit_scale": 1.0, "low": -bound,
                "high": bound, "has_tails": not is_circular, "is_circular": is_circular,
            }  # fmt: skip
    raise UnsupportedError(f"the univariate {getattr(univariate, '__name__', univariate)}")


def _unconditional(module: Any) -> Part:
    """A permutation, or an affine transform with numbers of its own."""
    names, slots = _arguments(module)
    if module.f is PermutationTransform and len(names) == 1:
        return permutation_part(module, getattr(module, names[0]).tolist(), slots[0])
    are_tensors = all(isinstance(getattr(module, name), Tensor) for name in names)
    if module.f is AffineTransform and names in (["loc", "scale"], ["_0", "_1"]) and are_tensors:
        return affine_part(module, scale=slots[1], shift=slots[0])
    raise UnsupportedError(f"UnconditionalTransform of {getattr(module.f, '__name__', module.f)}")


def _base(module: Any) -> Part:
    """The normal distribution in which a flow ends."""
    if type(module) is not UnconditionalDistribution:
        raise UnsupportedError(f"the base {type(module).__name__}")
    names, slots = _arguments(module)
    if module.f is DiagNormal and names in (["_0", "_1"], ["loc", "scale"]):
        return normal_part(module, scale=slots[1], loc=slots[0])
    raise UnsupportedError(f"the base {getattr(module.f, '__name__', module.f)}")


def _arguments(module: Any) -> tuple[list[str], list[Slot]]:
    """The names of the arguments of a module's constructor, and where they are if they are tensors."""
    names = [*(f"_{i}" for i in range(module._nargs)), *module._keys]
    return names, [(module._buffers if name in module._buffers else module._parameters, name) for name in names]


class _AtContext(Transform):
    """A transform of zuko at a context, which is zuko's after `restore`; copies and pickles are of zuko's class."""

    module: Any
    context: Tensor | None
    is_inverse: bool
    """Whether it is the inverse of what the module makes."""

    @classmethod
    def of(cls, transform: Any, module: AcceleratedModule, context: Tensor | None, is_inverse: bool = False) -> Self:
        """Returns the transform that zuko makes of a module with this class."""
        transform.__class__ = cls
        transform.module, transform.context, transform.is_inverse = module, context, is_inverse
        return transform

    def _evaluate(self, x: Tensor, is_inverse: bool, log_det: str | None = None) -> Any:
        """The values and log-determinants in the shape of the batch; `None` if they are left to zuko."""
        if not is_accelerated(self.module):
            return None

        def fallback(x: Tensor, context: Tensor | None) -> Values:
            transform = library_class(self.module).forward(self.module, context)
            transform = transform.inv if is_inverse else transform
            return (transform(x), None) if log_det is None else transform.call_and_ladj(x)

        return self.module.acceleration.evaluate(self.module, x, self.context, is_inverse, fallback, log_det)

    def _call(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        result = self._evaluate(x, self.is_inverse)
        return super()._call(x) if result is None else result[0]

    def call_and_ladj(self, x: Float[Tensor, "*batch d"]) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch"]]:
        """Returns y and the logarithm of the Jacobian's determinant."""
        result = self._evaluate(x, self.is_inverse, "rows")
        return super().call_and_ladj(x) if result is None else result  # type: ignore[misc]


class MaskedAtContext(_AtContext, AutoregressiveTransform):  # type: ignore[misc]
    """A masked transform at a context."""

    def __reduce__(self) -> tuple[Any, ...]:
        return AutoregressiveTransform, (self.meta, self.passes)

    @property
    def inv(self) -> InverseAtContext:
        """The inverse."""
        return InverseAtContext(self)

    def _inverse(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        module, context = self.module, self.context
        result = self._evaluate(y, is_inverse=True)
        if result is None and is_accelerated(module):

            def step(module: Any, x: Tensor) -> tuple[Tensor]:
                return (module.meta(context, x).inv(y),)

            result = invert(module.acceleration, module, step, module, MaskedLinear, y, context, self.passes)
        return super()._inverse(y) if result is None else result[0]


class InverseAtContext(_InverseTransform):
    """The inverse of a masked transform at a context."""

    _inv: Any

    def __reduce__(self) -> tuple[Any, ...]:
        return _InverseTransform, (self._inv,)

    def call_and_ladj(self, y: Float[Tensor, "*batch d"]) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch"]]:
        """Returns x and the logarithm of the determinant of the inverse's Jacobian."""
        result = self._inv._evaluate(y, is_inverse=True, log_det="rows")
        return super().call_and_ladj(y) if result is None else result  # type: ignore[misc]


class ComposedAtContext(_AtContext, ComposedTransform):  # type: ignore[misc]
    """A composition, or the inverse of one, at a context: native code takes its transforms together."""

    def __reduce__(self) -> tuple[Any, ...]:
        return ComposedTransform, tuple(self.transforms)

    @property
    def inv(self) -> ComposedAtContext:
        """The inverse."""
        return self.of(super().inv, self.module, self.context, not self.is_inverse)


class FlowAtContext(NormalizingFlow):  # type: ignore[misc]
    """A flow at a context. zuko makes its transform and base once they are needed; copies are of zuko's class."""

    module: Any = None
    context: Tensor | None

    def __reduce__(self) -> tuple[Any, ...]:
        return NormalizingFlow, (self.transform, self.base)

    @cached_property
    def _library(self) -> Any:
        """The flow as zuko makes it."""
        return library_class(self.module).forward(self.module, self.context)

    @cached_property
    def transform(self) -> Any:
        """The transform from data to the base, without the base if that is not needed yet."""
        return self._library.transform if "_library" in vars(self) else self.module.transform(self.context)

    @cached_property
    def base(self) -> Any:
        """The base distribution."""
        return self._library.base

    @cached_property
    def reinterpreted(self) -> int:
        """The number of dimensions of the transform's batch that are dimensions of an event."""
        return self._library.reinterpreted

    def log_prob(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Returns the log-density of x."""
        result = None
        if self.module is not None and is_accelerated(self.module):

            def fallback(x: Tensor, context: Tensor | None) -> Values:
                return x, library_class(self.module).forward(self.module, context).log_prob(x)

            result = self.module.acceleration.evaluate(self.module, x, self.context, False, fallback, "rows")
        return super().log_prob(x) if result is None else result[1]


class AcceleratedTransform(AcceleratedModule):
    """A lazy masked transform."""

    def forward(self, c: Tensor | None = None) -> MaskedAtContext:
        return MaskedAtContext.of(super().forward(c), self, c)


class AcceleratedComposition(AcceleratedModule):
    """A lazy composition."""

    def forward(self, c: Tensor | None = None) -> ComposedAtContext:
        return ComposedAtContext.of(super().forward(c), self, c)


class AcceleratedFlow(AcceleratedModule):
    """A lazy flow, of which native code computes the density together with that of a normal base."""

    def forward(self, c: Tensor | None = None) -> FlowAtContext:
        flow = FlowAtContext.__new__(FlowAtContext)
        flow.module, flow.context = self, c
        return flow


ADAPTERS = (
    Adapter(MaskedAutoregressiveTransform, ("forward",), AcceleratedTransform, describe),
    Adapter(LazyComposedTransform, ("forward",), AcceleratedComposition, describe, is_composition=True),
    Adapter(Flow, ("forward",), AcceleratedFlow, describe, is_composition=True),
)
