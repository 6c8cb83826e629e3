"""pyro: affine, spline and neural autoregressive transforms and couplings, conditional or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.distributions.transforms.affine_autoregressive import AffineAutoregressive, ConditionalAffineAutoregressive
from pyro.distributions.transforms.affine_coupling import AffineCoupling, ConditionalAffineCoupling
from pyro.distributions.transforms.neural_autoregressive import ConditionalNeuralAutoregressive, NeuralAutoregressive
from pyro.distributions.transforms.spline import ConditionalSpline
from pyro.distributions.transforms.spline_autoregressive import ConditionalSplineAutoregressive, SplineAutoregressive
from pyro.distributions.transforms.spline_coupling import SplineCoupling
from pyro.distributions.transforms.utils import clamp_preserve_gradients
from pyro.nn.auto_reg_nn import AutoRegressiveNN, ConditionalAutoRegressiveNN, MaskedLinear
from pyro.nn.dense_nn import ConditionalDenseNN, DenseNN
from torch import Tensor, nn

from jacobiflow.adapters.adapter import AcceleratedModule, Adapter
from jacobiflow.adapters.library_module import library_class, shallow_copy
from jacobiflow.adapters.native_module import TransformOutput
from jacobiflow.adapters.network import LibraryNetwork
from jacobiflow.adapters.passes import attach_gradients, invert_by_passes, needs_gradient
from jacobiflow.adapters.root import find_bound, find_root
from jacobiflow.errors import UnsupportedError
from jacobiflow.native.boundary import ScaleActivation, SplineBoundary, TransformKind
from jacobiflow.native.transforms import ChainTransform, constant_transform, coupling_transform, masked_transform


def list_transforms(module: Any, is_conditional: bool) -> Iterator[ChainTransform]:
    """Yields the transform, see `ListTransforms`. pyro remembers the values between transforms, so each is alone."""
    kind: Any = library_class(module)
    if kind not in _MIXINS:
        raise UnsupportedError(kind.__name__)
    network = getattr(module.upper_spline if kind is SplineCoupling else module, "nn", None) or module.arn
    if type(network) not in (AutoRegressiveNN, ConditionalAutoRegressiveNN, DenseNN, ConditionalDenseNN):
        raise UnsupportedError(f"the network {type(network).__name__}")
    # A conditional transform has its settings at any context.
    transform = kind.condition(module, None) if issubclass(kind, ConditionalTransformModule) else module
    kind = library_class(transform)
    if kind is AffineAutoregressive:
        yield masked_transform(_masked_network(network, [1, 1]), **_affine_fields(transform))
    elif kind is SplineAutoregressive:
        fields, sizes = _spline_fields(transform.spline)
        yield masked_transform(_masked_network(network, sizes), **fields)
    elif kind is AffineCoupling:
        if transform.dim != -1:
            raise UnsupportedError("a coupling that splits another dimension than the last")
        yield _coupling(network, module.split_dim, [1, 1], _affine_fields(transform))
    elif kind is SplineCoupling:
        fields, sizes = _spline_fields(module.upper_spline)
        yield (coupling := _coupling(network, module.split_dim, sizes, fields))
        if not module.identity and module.split_dim:
            holder = module.lower_spline._parameters
            places = [(holder, name) for name in holder]
            yield constant_transform(places, coupling.structure.features, range(module.split_dim), **fields)
    else:
        raise UnsupportedError(kind.__name__)


def _affine_fields(transform: Any) -> dict[str, Any]:
    """Returns the native fields of an affine transform."""
    return {
        "kind": TransformKind.MASKED_AFFINE, "scale_activation": ScaleActivation.CLAMPED_EXP, "scale_index": 1,
        "min_log_scale": transform.log_scale_min_clip, "max_log_scale": transform.log_scale_max_clip,
    }  # fmt: skip


def _spline_fields(spline: Any) -> tuple[dict[str, Any], list[int]]:
    """Returns the native fields of a spline, and the sizes of its parameters."""
    bins, is_linear = spline.count_bins, spline.order == "linear"
    return {
        "kind": TransformKind.RATIONAL_LINEAR if is_linear else TransformKind.RATIONAL_QUADRATIC, "bins": bins,
        "boundary": SplineBoundary.FIXED, "end_slope": 1 - 1e-3, "logit_scale": 1.0, "low": -spline.bound,
        "high": spline.bound, "has_tails": True, "min_width": 1e-3, "min_height": 1e-3, "min_slope": 1e-3,
        "edge_margin": 1e-6,
    }, [bins, bins, bins - 1, *([bins] if is_linear else [])]  # fmt: skip


def _masked_network(arn: Any, sizes: Sequence[int]) -> LibraryNetwork:
    """Returns the network of a masked transform. The parameters of each feature have these sizes."""
    if list(arn.param_dims) != sizes or isinstance(arn, ConditionalDenseNN):
        raise UnsupportedError("parameters of other sizes")
    outputs = torch.arange(arn.layers[-1].out_features, device="cpu").view(-1, arn.input_dim).t()
    network = LibraryNetwork(outputs, context_columns=range(arn.context_dim))
    value = network.add_layers(0, _layers(arn), (MaskedLinear,))
    if arn.skip_layer is not None:
        network.add_sum(network.add_layer(0, arn.skip_layer), value)
    return network


def _layers(network: Any) -> list[nn.Module]:
    """Returns the layers and activations of a network."""
    return [part for layer in network.layers for part in (layer, network.f)][:-1]


def _coupling(dense: Any, split: int, sizes: Sequence[int], fields: Mapping[str, Any]) -> ChainTransform:
    """Returns a coupling whose first features stay as they are. Its outputs are the parameters one after the other."""
    transformed = dense.param_dims[0] // sizes[0]
    if not transformed:
        raise UnsupportedError("a coupling that transforms no feature")
    if list(dense.param_dims) != [transformed * size for size in sizes]:
        raise UnsupportedError("parameters of other sizes")
    parts = torch.arange(sum(dense.param_dims), device="cpu").split(dense.param_dims)
    outputs = torch.cat([part.view(transformed, -1) for part in parts], dim=1)
    network = LibraryNetwork(outputs, range(dense.context_dim), dense.input_dim)
    network.add_layers(0, _layers(dense))
    return coupling_transform(network, range(split), range(split, split + transformed), **fields)


class AcceleratedTransform(AcceleratedModule):
    """A transform, or a conditional transform at a context.

    Attributes:
        cache_name: The attribute in which pyro keeps the logarithms of derivatives. It sums over the last dimension.
        log_det: That of `TransformChain.evaluate`.
    """

    cache_name: ClassVar[str] = "_cached_log_scale"
    log_det: ClassVar[str] = "rows"
    arn: Any
    _conditional: Any
    _context: Tensor | None = None

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
        result: Any = self.acceleration.evaluate(self._owner, x, context, is_inverse, library_call, self.log_det)
        if result is None:
            return None
        values, log_det = result
        log_det = -log_det if is_inverse else log_det
        setattr(self, self.cache_name, log_det.unsqueeze(-1) if self.log_det == "rows" else log_det)
        return values

    def _library_call(self, is_inverse: bool, module: Any, x: Tensor, context: Tensor | None) -> TransformOutput:
        kind: Any = library_class(module)
        transform = module if context is None else kind.condition(module, context)
        kind = library_class(transform)
        values = kind._inverse(transform, x) if is_inverse else kind._call(transform, x)
        log_det = getattr(transform, self.cache_name)
        log_det = log_det.sum(-1) if self.log_det == "rows" else log_det
        return values, -log_det if is_inverse else log_det

    def _invert(self, y: Tensor) -> Tensor:
        """Returns the inverse without native code."""
        return super()._inverse(y)  # type: ignore[misc]


class AcceleratedSplineCoupling(AcceleratedTransform):
    """A coupling of splines."""

    cache_name = "_cache_log_detJ"


class _AcceleratedMasked(AcceleratedTransform):
    """A masked transform.

    Attributes:
        _pass: y, the network's output -> the next iterate, and the logarithms of derivatives.
    """

    log_det = "features"
    _pass: Any

    def _invert(self, y: Tensor) -> Tensor:
        network, context = self.arn if self._context is None else self._conditional.nn, self._context

        def step(network: Any, x: Tensor) -> Sequence[Tensor]:
            return self._pass(y, network(x) if context is None else network(x, context=context))

        outputs = invert_by_passes(self.acceleration, self._owner, step, network, y, context, y.shape[-1])
        if outputs is None:
            return super()._invert(y)
        x, log_scale = outputs
        setattr(self, self.cache_name, log_scale)
        return x


class AcceleratedAffine(_AcceleratedMasked):
    """An affine transform of each feature.

    pyro's loop sets one feature at a time, and a pass sets all of them. Both end at the same bits if all values are
    finite.
    """

    log_scale_min_clip: float
    log_scale_max_clip: float

    def _pass(self, y: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        mean, log_scale = parameters
        log_scale = clamp_preserve_gradients(log_scale, self.log_scale_min_clip, self.log_scale_max_clip)
        x = (y - mean) * torch.exp(-log_scale)
        return x.contiguous(), log_scale  # pyro's result is contiguous too.


class AcceleratedSpline(_AcceleratedMasked):
    """A spline of each feature."""

    cache_name = "_cache_log_detJ"

    spline: Any

    def _pass(self, y: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        bins, bound, order = self.spline.count_bins, self.spline.bound, self.spline.order
        spline = ConditionalSpline(lambda _: parameters, y.shape[-1], bins, bound, order).condition(None)
        return spline._inverse(y), spline._cache_log_detJ


class AcceleratedNeural(AcceleratedTransform):
    """A neural autoregressive transform. pyro has no inverse of it, so it is searched feature by feature.

    The search, and the density at its result, are in float64: in float32, values near the ends have no inverse.
    """

    def log_abs_det_jacobian(
        self, x: Float[Tensor, "*batch d"], y: Float[Tensor, "*batch d"]
    ) -> Float[Tensor, "*batch"]:
        """Returns the logarithm of the determinant, as pyro computes it from what the latest call stored."""
        log_det: Tensor = super().log_abs_det_jacobian(x, y)  # type: ignore[misc]
        return log_det.to(x.dtype)

    def _invert(self, y: Tensor) -> Tensor:
        x, features = torch.zeros_like(y), self.arn.get_permutation()
        with torch.no_grad():
            for feature in features[:, None]:
                transform = self._in_float64([parameter[..., feature] for parameter in self.arn(x)])
                function, target = partial(_evaluate, transform), y[..., feature].double()
                x[..., feature] = find_root(function, target, find_bound(function, target)).to(x.dtype)
        if needs_gradient(self._owner, y, self._context):
            (x,) = attach_gradients(x, partial(self._newton_step, y), len(features))
        transform = self._in_float64(self.arn(x))
        transform._call(x.double())
        stored = ("_cached_log_df_inv_dx", "_cached_A", "_cached_W_pre", "_cached_C", "_cached_T_C")
        vars(self).update({name: vars(transform)[name] for name in stored})
        self.acceleration.record_use(self._owner, len(features), "passes")
        return x

    def _in_float64(self, parameters: Sequence[Tensor]) -> Any:
        """Returns the transform with these parameters, whatever its argument is."""
        doubles = [parameter.double() for parameter in parameters]
        return shallow_copy(self, NeuralAutoregressive, arn=lambda _: doubles)

    def _newton_step(self, y: Tensor, x: Tensor) -> tuple[Tensor]:
        """Returns x, with the gradients of x - (f(x) - y) / f'(x) in each feature."""
        parameters = self.arn(x)
        transform = self._in_float64([each.detach() for each in parameters])
        (slope,) = torch.autograd.grad(_evaluate(transform, x).sum(), x)
        residual = _evaluate(self._in_float64(parameters), x) - y
        # The slope is 0 at a bound. No x gives y there, and the gradient is 0.
        return (x - ((residual - residual.detach()) / slope.where(slope != 0, torch.inf)).to(x.dtype),)


def _evaluate(transform: Any, x: Tensor) -> Tensor:
    """Returns f(x) of each feature. It is infinite where tanh rounds to 1 or beyond it, whose inverse is NaN."""
    y = transform._call(x.double())
    is_finite = torch.stack([parameter.isfinite().all(dim=-2) for parameter in transform.arn(x)]).all(dim=0)
    return y.where(~(y.isnan() & is_finite & ~x.isnan()), torch.full_like(y, torch.inf).copysign(x))


# Python only lets a module have this class if pyro's own class is the first base.
class AcceleratedConditional(ConditionalTransformModule, AcceleratedModule):
    """A conditional transform whose transforms at a context are accelerated."""

    __init_subclass__ = AcceleratedModule.__init_subclass__

    def condition(self, context: Float[Tensor, "*batch c"]) -> nn.Module:
        """Returns the transform at a context, as pyro does."""
        transform = super().condition(context)  # type: ignore[safe-super]
        # As a submodule, the conditional transform would give pyro its parameters twice.
        vars(transform).update(_conditional=self, _context=context)
        self.acceleration.replace_class(transform, _MIXINS[library_class(transform)])
        return transform


class _PyroAdapter(Adapter):
    def check(self, module: nn.Module) -> None:
        super().check(module)
        if vars(module).get("kwargs", {}).get("stable"):  # Its transforms at a context have methods of their own.
            raise UnsupportedError("stable=True replaces the methods of its transforms")


_MIXINS: dict[type[nn.Module], type[AcceleratedModule]] = {
    AffineAutoregressive: AcceleratedAffine, ConditionalAffineAutoregressive: AcceleratedConditional,
    SplineAutoregressive: AcceleratedSpline, ConditionalSplineAutoregressive: AcceleratedConditional,
    NeuralAutoregressive: AcceleratedNeural, ConditionalNeuralAutoregressive: AcceleratedConditional,
    AffineCoupling: AcceleratedTransform, ConditionalAffineCoupling: AcceleratedConditional,
    SplineCoupling: AcceleratedSplineCoupling,
}  # fmt: skip
_METHODS: dict[type[AcceleratedModule], tuple[str, ...]] = {
    AcceleratedConditional: ("condition",), AcceleratedNeural: ("_call", "_inverse"),
}  # fmt: skip
ADAPTERS: tuple[Adapter, ...] = tuple(
    _PyroAdapter(
        kind, _METHODS.get(mixin, ("_inverse",)), mixin, list_transforms,
        needs_native="Coupling" in kind.__name__, has_search=lambda module: "Neural" in library_class(module).__name__,
    )
    for kind, mixin in _MIXINS.items()
)  # fmt: skip
