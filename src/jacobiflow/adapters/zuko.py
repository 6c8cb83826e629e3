"""zuko: `MaskedAutoregressiveTransform`, of which MAF, NSF, NCSF, NAF, UNAF, SOSPF and BPF are made; compositions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import AffineTransform, Transform
from zuko.flows.autoregressive import MaskedAutoregressiveTransform
from zuko.flows.spline import CircularRQSTransform
from zuko.lazy import LazyComposedTransform, LazyInverse, UnconditionalTransform
from zuko.nn import MaskedLinear, MaskedMLP, Residual
from zuko.transforms import (
    AutoregressiveTransform,
    ComposedTransform,
    MonotonicAffineTransform,
    MonotonicRQSTransform,
    PermutationTransform,
)

from jacobiflow.adapters.chain import Library, Link, Values, is_plain_module
from jacobiflow.adapters.masked import MaskedNetwork, UnsupportedError, chain
from jacobiflow.adapters.network import needs_graph, premasked
from jacobiflow.adapters.part import Description, Slot
from jacobiflow.adapters.passes import Solvable, solve
from jacobiflow.adapters.swapped import Adapter, Swapped
from jacobiflow.native.structures import Elementwise, Ends


class Zuko(Library):
    """zuko's lazy transforms."""

    def links(self, module: Any) -> Iterator[Link]:
        """See `Library`."""
        kind = Swapped.library_class_of(module) or type(module)
        if is_plain_module(module, "forward") and kind is LazyComposedTransform:
            for part in module.transforms:
                yield from self.links(part)
        elif is_plain_module(module, "forward") and kind is LazyInverse:
            for part, is_reversed in reversed(list(self.links(module.transform))):
                yield part, not is_reversed
        else:
            yield module, False

    def describe(self, module: Any, is_conditional: bool) -> Description:
        """See `Library`."""
        kind = Swapped.library_class_of(module) or type(module)
        if kind is UnconditionalTransform:
            return _unconditional(module)
        if kind is not MaskedAutoregressiveTransform:
            raise UnsupportedError(kind.__name__)
        if type(module.hyper) is not MaskedMLP:
            raise UnsupportedError(f"the network {type(module.hyper).__name__}")
        network = chain(list(module.hyper), MaskedLinear, Residual)
        outputs = torch.arange(module.hyper[-1].mask.shape[0], device="cpu").view(-1, module.total)
        attributes = [(vars(module), name) for name in ("univariate", "shapes", "total", "meta")]
        return Description(
            module,
            _univariate(module.univariate, list(module.shapes)),
            MaskedNetwork(network, slice(0, len(outputs)), outputs),
            attributes=tuple(attributes),
        )

    def call(
        self, module: Any, x: Float[Tensor, "b d"], context: Tensor | None, is_inverse: bool, is_accelerated: bool
    ) -> Values:
        """See `Library`."""
        if is_accelerated or not isinstance(module, Swapped):
            transform = module(context)
        else:
            transform = module.library_class.forward(module, context)
        values, log_det = (transform.inv if is_inverse else transform).call_and_ladj(x)
        return values, log_det.reshape(len(x), -1).sum(dim=1)


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
        return {"kind": Elementwise.SOFT_CLIPPED_AFFINE, "first": clip}
    if univariate in (MonotonicRQSTransform, CircularRQSTransform) and len(sizes) == 3 and len(sizes[0]) == 1:
        (bins,), is_circular = sizes[0], univariate is CircularRQSTransform
        if sizes == [(bins,), (bins,), (bins - 1,)]:
            bound = math.pi if is_circular else bound
            return {
                "kind": Elementwise.RATIONAL_QUADRATIC, "bins": bins, "ends": Ends.FIXED, "end_slope": 1.0,
                "is_soft_clipped": True, "clip": clip, "factor": 1.0, "low": -bound, "high": bound,
                "has_tails": not is_circular, "is_circular": is_circular,
            }  # fmt: skip
    raise UnsupportedError(f"the univariate {getattr(univariate, '__name__', univariate)}")


def _unconditional(module: Any) -> Description:
    """A permutation, or an affine transform with numbers of its own."""

    def slot(name: str) -> Slot:
        return (module._buffers if name in module._buffers else module._parameters), name

    names = [*(f"_{i}" for i in range(module._nargs)), *module._keys]
    if module.f is PermutationTransform and len(names) == 1:
        holder, name = slot(names[0])
        return Description(
            module, order=holder[name].tolist(), constants=((holder, name),), attributes=((vars(module), "f"),)
        )
    numbers = [getattr(module, name) for name in names]
    if module.f is AffineTransform and names in (["loc", "scale"], ["_0", "_1"]) and _are_tensors(numbers):
        return Description(module, tensors=(slot(names[1]), slot(names[0])), attributes=((vars(module), "f"),))
    raise UnsupportedError(f"UnconditionalTransform of {getattr(module.f, '__name__', module.f)}")


def _are_tensors(values: list[Any]) -> bool:
    return all(isinstance(value, Tensor) for value in values)


ZUKO = Zuko()


class _AtContext(Transform):
    """A transform x -> y of zuko at a context that goes through native code if it can.

    It follows its module: after `restore` it is zuko's. Copies and pickles are of zuko's class.
    """

    module: Any
    context: Tensor | None

    def _by_native_code(self, x: Tensor, is_inverse: bool, log_det: str | None = None) -> Any:
        """The values and log-determinants in the shape of the batch; `None` if they are left to zuko."""
        if Swapped.library_class_of(self.module) is None or x.ndim == 0:
            return None
        try:
            batch = _batch(x, self.context)
        except RuntimeError:  # zuko's message is its own
            return None
        result = self.module.acceleration.by_native_code(
            self.module, ZUKO, *_rows(x, self.context, batch), is_inverse, log_det
        )
        if result is None:
            return None
        values, log_dets = result
        return values.view(*batch, values.shape[-1]), None if log_dets is None else log_dets.view(batch)

    def _call(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        result = self._by_native_code(x, is_inverse=False)
        return super()._call(x) if result is None else result[0]

    def _inverse(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        result = self._by_native_code(y, is_inverse=True)
        return super()._inverse(y) if result is None else result[0]

    def call_and_ladj(self, x: Float[Tensor, "*batch d"]) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch"]]:
        """y and the logarithm of the Jacobian's determinant."""
        result = self._by_native_code(x, is_inverse=False, log_det="rows")
        return super().call_and_ladj(x) if result is None else result  # type: ignore[misc]


class ParallelInverse(_AtContext, AutoregressiveTransform):  # type: ignore[misc]
    """A masked transform at a context."""

    def __init__(self, module: Accelerated, context: Float[Tensor, "*batch c"] | None) -> None:
        AutoregressiveTransform.__init__(self, partial(module.meta, context), module.passes)
        self.module, self.context = module, context

    def __reduce__(self) -> tuple[Any, ...]:
        return AutoregressiveTransform, (self.meta, self.passes)

    def _inverse(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        if Swapped.library_class_of(self.module) is None:
            return AutoregressiveTransform._inverse(self, y)
        result = self._by_native_code(y, is_inverse=True)
        return self._solve(y) if result is None else result[0]

    def _solve(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        module, context = self.module, self.context
        cheaper = cache(partial(premasked, module, MaskedLinear))

        def step(x: Tensor, y: Tensor, context: Tensor | None) -> tuple[Tensor]:
            transform = module if torch.is_grad_enabled() else cheaper()
            return (transform.meta(context, x).inv(y),)

        outputs = solve(module, step, y, context, self.passes, needs_graph(module, y, context))
        if outputs is None:
            return AutoregressiveTransform._inverse(self, y)
        return outputs[0].reshape(*_batch(y, context), y.shape[-1])


class Composition(_AtContext, ComposedTransform):  # type: ignore[misc]
    """A composition at a context: native code takes its transforms together."""

    @classmethod
    def of(cls, transform: ComposedTransform, module: AcceleratedComposition, context: Tensor | None) -> Composition:
        """The same transform, by native code."""
        transform.__class__ = cls
        transform.module, transform.context = module, context
        return transform

    def __reduce__(self) -> tuple[Any, ...]:
        return ComposedTransform, tuple(self.transforms)

    @property
    def inv(self) -> InverseComposition:
        """The inverse."""
        inverse: Any = super().inv
        inverse.__class__ = InverseComposition
        inverse.composition = self
        return inverse


class InverseComposition(ComposedTransform):  # type: ignore[misc]
    """The inverse of a composition."""

    composition: Composition

    def __reduce__(self) -> tuple[Any, ...]:
        return ComposedTransform, tuple(self.transforms)

    def _call(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        result = self.composition._by_native_code(y, is_inverse=True)
        return super()._call(y) if result is None else result[0]

    def call_and_ladj(self, y: Float[Tensor, "*batch d"]) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch"]]:
        """x and the logarithm of the determinant of the inverse's Jacobian."""
        result = self.composition._by_native_code(y, is_inverse=True, log_det="rows")
        return super().call_and_ladj(y) if result is None else result


class Accelerated(Solvable):
    """A lazy masked transform."""

    library = ZUKO

    meta: Any
    passes: int

    def forward(self, c: Tensor | None = None) -> ParallelInverse:
        return ParallelInverse(self, c)

    def rows(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Solvable`."""
        return _rows(y, context, _batch(y, context))


class AcceleratedComposition(Swapped):
    """A lazy composition."""

    def forward(self, c: Tensor | None = None) -> Composition:
        return Composition.of(super().forward(c), self, c)


def _batch(y: Tensor, context: Tensor | None) -> torch.Size:
    return y.shape[:-1] if context is None else torch.broadcast_shapes(y.shape[:-1], context.shape[:-1])


def _rows(
    y: Tensor, context: Tensor | None, batch: torch.Size
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "#b c"] | None]:
    """The inputs with a row for each sample of the batch that they make together; one of the context if it has one."""
    y = y.expand(*batch, y.shape[-1]).reshape(-1, y.shape[-1])
    if context is None:
        return y, None
    width = context.shape[-1]
    if context.shape[:-1].numel() == 1:
        return y, context.reshape(1, width)
    return y, context.expand(*batch, width).reshape(-1, width)


ADAPTERS = (
    Adapter(MaskedAutoregressiveTransform, ("forward",), Accelerated, ZUKO),
    Adapter(LazyComposedTransform, ("forward",), AcceleratedComposition, ZUKO, is_composition=True),
)
