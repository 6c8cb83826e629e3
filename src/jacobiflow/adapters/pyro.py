"""pyro: `AffineAutoregressive` and `SplineAutoregressive`, conditional or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.distributions.transforms.affine_autoregressive import AffineAutoregressive, ConditionalAffineAutoregressive
from pyro.distributions.transforms.spline import ConditionalSpline
from pyro.distributions.transforms.spline_autoregressive import ConditionalSplineAutoregressive, SplineAutoregressive
from pyro.distributions.transforms.utils import clamp_preserve_gradients
from pyro.nn.auto_reg_nn import AutoRegressiveNN, ConditionalAutoRegressiveNN, MaskedLinear
from torch import Tensor, nn

from jacobiflow.adapters.adapter import AcceleratedModule, Adapter
from jacobiflow.adapters.library_module import default_of, library_class
from jacobiflow.adapters.native_module import TransformOutput
from jacobiflow.adapters.network import LibraryNetwork
from jacobiflow.adapters.passes import invert_by_passes
from jacobiflow.errors import UnsupportedError
from jacobiflow.native.boundary import ScaleActivation, SplineBoundary, TransformKind
from jacobiflow.native.transforms import ChainTransform, masked_transform


def list_transforms(module: Any, is_conditional: bool) -> Iterator[ChainTransform]:
    """Yields the transform, see `ListTransforms`. pyro remembers the values between transforms, so each is alone."""
    kind = library_class(module)
    options = vars(module).get("kwargs", vars(module))  # A conditional transform has its settings in kwargs.
    if kind in (AffineAutoregressive, ConditionalAffineAutoregressive):
        settings: dict[str, Any] = {
            "kind": TransformKind.MASKED_AFFINE, "scale_activation": ScaleActivation.CLAMPED_EXP, "scale_index": 1,
            "min_log_scale": _option(options, AffineAutoregressive, "log_scale_min_clip"),
            "max_log_scale": _option(options, AffineAutoregressive, "log_scale_max_clip"),
        }  # fmt: skip
        sizes = [1, 1]
    elif kind in (SplineAutoregressive, ConditionalSplineAutoregressive):
        settings, sizes = _spline_fields(options if kind is ConditionalSplineAutoregressive else vars(module.spline))
    else:
        raise UnsupportedError(kind.__name__)
    network = module.nn if hasattr(module, "nn") else module.arn
    if type(network) not in (AutoRegressiveNN, ConditionalAutoRegressiveNN):
        raise UnsupportedError(f"the network {type(network).__name__}")
    if list(network.param_dims) != sizes:
        raise UnsupportedError("parameters of other sizes")
    yield masked_transform(_build_network(network), **settings)


def _option(options: Mapping[str, Any], kind: type[nn.Module], name: str) -> Any:
    """Returns an option of a transform; by default that of its class."""
    return options[name] if name in options else default_of(kind, name)


def _spline_fields(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """Returns the native fields of a spline, and the sizes of its parameters."""
    bins, bound, order = (_option(options, SplineAutoregressive, name) for name in ("count_bins", "bound", "order"))
    kind = TransformKind.RATIONAL_LINEAR if order == "linear" else TransformKind.RATIONAL_QUADRATIC
    return {
        "kind": kind, "bins": bins, "boundary": SplineBoundary.FIXED, "end_slope": 1 - 1e-3,
        "logit_scale": 1.0, "low": -bound, "high": bound, "has_tails": True, "min_width": 1e-3, "min_height": 1e-3,
        "min_slope": 1e-3, "edge_margin": 1e-6,
    }, [bins, bins, bins - 1, *([bins] if order == "linear" else [])]  # fmt: skip


def _build_network(arn: Any) -> LibraryNetwork:
    *hidden, last = arn.layers
    if any(type(layer) is not MaskedLinear for layer in arn.layers):
        raise UnsupportedError("layers of another kind")
    outputs = torch.arange(last.out_features, device="cpu").view(-1, arn.input_dim).t()
    network, value = LibraryNetwork(outputs, context_columns=range(arn.context_dim)), 0
    for layer in hidden:
        value = network.add_layer(value, layer, arn.f)
    value = network.add_layer(value, last)
    if arn.skip_layer is not None:
        network.add_sum(network.add_layer(0, arn.skip_layer), value)
    return network


class _AcceleratedTransform(AcceleratedModule):
    """A transform, or a conditional transform at a context.

    Attributes:
        cache_name: The attribute in which pyro keeps the logarithms of derivatives.
        _pass: y, the network's output -> the next iterate, and the logarithms of derivatives.
    """

    cache_name: ClassVar[str]
    arn: Any
    _conditional: Any
    _context: Tensor | None = None
    _pass: Any

    def _call(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        result = self._evaluate(x, is_inverse=False)
        return super()._call(x) if result is None else result  # type: ignore[misc]

    def _inverse(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        result = self._evaluate(y, is_inverse=True)
        return self._invert(y) if result is None else result

    @property
    def _owner(self) -> Any:
        """The module of the flow: the conditional transform, or this one."""
        return self if self._context is None else self._conditional

    def _evaluate(self, x: Tensor, is_inverse: bool) -> Tensor | None:
        try:
            context = None if self._context is None else self._context.expand(*x.shape[:-1], -1)
        except RuntimeError:  # pyro raises its own error for such a context.
            return None
        library_call = partial(self._library_call, is_inverse)
        result: Any = self.acceleration.evaluate(self._owner, x, context, is_inverse, library_call, "features")
        if result is None:
            return None
        values, log_derivative = result
        setattr(self, self.cache_name, -log_derivative if is_inverse else log_derivative)
        return values

    def _library_call(self, is_inverse: bool, module: Any, x: Tensor, context: Tensor | None) -> TransformOutput:
        kind: Any = library_class(module)
        transform = module if context is None else kind.condition(module, context)
        kind = library_class(transform)
        values = kind._inverse(transform, x) if is_inverse else kind._call(transform, x)
        log_scale = getattr(transform, self.cache_name)
        return values, -log_scale if is_inverse else log_scale

    def _invert(self, y: Tensor) -> Tensor:
        network, context = self.arn if self._context is None else self._conditional.nn, self._context

        def step(network: Any, x: Tensor) -> Sequence[Tensor]:
            return self._pass(y, network(x) if context is None else network(x, context=context))

        outputs = invert_by_passes(self.acceleration, self._owner, step, network, y, context, y.shape[-1])
        if outputs is None:
            return super()._inverse(y)  # type: ignore[misc]
        x, log_scale = outputs
        setattr(self, self.cache_name, log_scale)
        return x


class AcceleratedAffine(_AcceleratedTransform):
    """An affine transform of each feature.

    pyro's loop sets one feature at a time, and a pass sets all of them. Both end at the same bits if all values are
    finite.
    """

    cache_name = "_cached_log_scale"

    log_scale_min_clip: float
    log_scale_max_clip: float

    def _pass(self, y: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        mean, log_scale = parameters
        log_scale = clamp_preserve_gradients(log_scale, self.log_scale_min_clip, self.log_scale_max_clip)
        x = (y - mean) * torch.exp(-log_scale)
        return x.contiguous(), log_scale  # pyro's result is contiguous too.


class AcceleratedSpline(_AcceleratedTransform):
    """A spline of each feature."""

    cache_name = "_cache_log_detJ"

    spline: Any

    def _pass(self, y: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        bins, bound, order = self.spline.count_bins, self.spline.bound, self.spline.order
        spline = ConditionalSpline(lambda _: parameters, y.shape[-1], bins, bound, order).condition(None)
        return spline._inverse(y), spline._cache_log_detJ


# Python only lets a module have this class if pyro's own class is the first base.
class AcceleratedConditional(ConditionalTransformModule, AcceleratedModule):
    """A conditional transform whose transforms at a context are accelerated."""

    __init_subclass__ = AcceleratedModule.__init_subclass__

    def condition(self, context: Float[Tensor, "*batch c"]) -> nn.Module:
        """Returns the transform at a context, as pyro does."""
        transform = super().condition(context)  # type: ignore[safe-super]
        # As a submodule, the conditional transform would give pyro its parameters twice.
        vars(transform).update(_conditional=self, _context=context)
        kind = AcceleratedAffine if isinstance(transform, AffineAutoregressive) else AcceleratedSpline
        self.acceleration.replace_class(transform, kind)
        return transform


ADAPTERS: tuple[Adapter, ...] = (
    Adapter(AffineAutoregressive, ("_inverse",), AcceleratedAffine, list_transforms),
    Adapter(SplineAutoregressive, ("_inverse",), AcceleratedSpline, list_transforms),
    Adapter(ConditionalAffineAutoregressive, ("condition",), AcceleratedConditional, list_transforms),
    Adapter(ConditionalSplineAutoregressive, ("condition",), AcceleratedConditional, list_transforms),
)
