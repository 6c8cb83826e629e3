"""pyro: `AffineAutoregressive` and `SplineAutoregressive`, conditional or not, whose slow side is the inverse."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.distributions.transforms.affine_autoregressive import AffineAutoregressive, ConditionalAffineAutoregressive
from pyro.distributions.transforms.spline import ConditionalSpline
from pyro.distributions.transforms.spline_autoregressive import ConditionalSplineAutoregressive, SplineAutoregressive
from pyro.distributions.transforms.utils import clamp_preserve_gradients
from pyro.nn.auto_reg_nn import AutoRegressiveNN, ConditionalAutoRegressiveNN, MaskedLinear
from torch import Tensor, nn

from jacobiflow.adapters.chain import Library, Link
from jacobiflow.adapters.masked import Activation, Linear, MaskedNetwork, Operation, Sum, UnsupportedError, check_plain
from jacobiflow.adapters.network import needs_graph, premasked
from jacobiflow.adapters.part import Description, Slot
from jacobiflow.adapters.passes import Solvable, solve
from jacobiflow.adapters.swapped import Adapter, Swapped
from jacobiflow.native.structures import Elementwise, Ends


class Pyro(Library):
    """pyro's transforms: each is a chain of its own, as pyro remembers the values between them."""

    def links(self, module: Any) -> Iterator[Link]:
        """See `Library`."""
        yield module, False

    def describe(self, module: Any, is_conditional: bool) -> Description:
        """See `Library`. A conditional transform keeps its settings in `kwargs`."""
        kind = Swapped.library_class_of(module) or type(module)
        if kind in (AffineAutoregressive, ConditionalAffineAutoregressive):
            options = vars(module).get("kwargs", vars(module))
            names = ("log_scale_min_clip", "log_scale_max_clip", "stable")
            attributes: list[Slot] = [(options, name) for name in names]
            settings: dict[str, Any] = {
                "kind": Elementwise.CLAMPED_AFFINE, "first": options.get("log_scale_min_clip", -5.0),
                "second": options.get("log_scale_max_clip", 3.0),
            }  # fmt: skip
            sizes = [1, 1]
        elif kind in (SplineAutoregressive, ConditionalSplineAutoregressive):
            options = vars(module)["kwargs"] if kind is ConditionalSplineAutoregressive else vars(module.spline)
            attributes = [(options, name) for name in ("count_bins", "bound", "order")]
            settings, sizes = _spline(options)
        else:
            raise UnsupportedError(kind.__name__)
        network = module.nn if hasattr(module, "nn") else module.arn
        if type(network) not in (AutoRegressiveNN, ConditionalAutoRegressiveNN):
            raise UnsupportedError(f"the network {type(network).__name__}")
        if list(network.param_dims) != sizes:
            raise UnsupportedError("parameters of other sizes")
        return Description(module, settings, _network(network), attributes=(*attributes, (vars(network), "f")))

    def call(
        self, module: Any, x: Float[Tensor, "b d"], context: Tensor | None, is_inverse: bool, is_accelerated: bool
    ) -> tuple[Tensor, Tensor]:
        """See `Library`; the log-determinant is by feature."""
        kind: Any = Swapped.library_class_of(module) or type(module)
        transform = module
        if context is not None:
            transform = kind.condition(module, context)
            kind = type(transform)
        values = kind._inverse(transform, x) if is_inverse else kind._call(transform, x)
        name = "_cached_log_scale" if hasattr(transform, "_cached_log_scale") else "_cache_log_detJ"
        derivative = getattr(transform, name)
        return values, -derivative if is_inverse else derivative


def _spline(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """The spline's settings, and the sizes of its parameters."""
    bins, bound, order = options.get("count_bins", 8), options.get("bound", 3.0), options.get("order", "linear")
    kind = Elementwise.RATIONAL_LINEAR if order == "linear" else Elementwise.RATIONAL_QUADRATIC
    return {
        "kind": kind, "bins": bins, "ends": Ends.FIXED, "end_slope": 1 - 1e-3, "factor": 1.0, "low": -bound,
        "high": bound, "has_tails": True, "least_width": 1e-3, "least_height": 1e-3, "least_slope": 1e-3, "gap": 1e-6,
    }, [bins, bins, bins - 1, *([bins] if order == "linear" else [])]  # fmt: skip


def _network(network: Any) -> MaskedNetwork:
    check_plain(network, *network.layers, *([] if network.skip_layer is None else [network.skip_layer]))
    if any(type(layer) is not MaskedLinear for layer in network.layers):
        raise UnsupportedError("layers of another kind")
    operations: list[Operation] = []
    for layer in network.layers[:-1]:
        operations += [Linear(len(operations), layer), Activation(len(operations) + 1, network.f)]
    operations.append(Linear(len(operations), network.layers[-1]))
    if network.skip_layer is not None:
        operations += [Linear(0, network.skip_layer), Sum(len(operations) + 1, len(operations))]
    outputs = torch.arange(network.layers[-1].out_features, device="cpu").view(-1, network.input_dim).t()
    start = network.context_dim
    return MaskedNetwork(tuple(operations), slice(start, start + network.input_dim), outputs)


PYRO = Pyro()


class _Accelerated(Solvable):
    """A transform by native code or by passes."""

    library = PYRO

    arn: Any

    def _call(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        result = self._by_native_code(x, is_inverse=False)
        return super()._call(x) if result is None else result  # type: ignore[misc]

    def _inverse(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        result = self._by_native_code(y, is_inverse=True)
        return self._solve(y) if result is None else result

    def _by_native_code(self, x: Float[Tensor, "*batch d"], is_inverse: bool) -> Float[Tensor, "*batch d"] | None:
        _, context = self._network
        if x.ndim == 0 or (context is not None and context.ndim > x.ndim):
            return None
        try:
            rows = self.rows(x, context)
        except RuntimeError:  # the library's message is its own
            return None
        result = self.acceleration.by_native_code(self.owner, PYRO, *rows, is_inverse, "features")
        if result is None:
            return None
        values, derivative = result
        assert derivative is not None
        self._remember((-derivative if is_inverse else derivative).view(x.shape))
        return values.view(x.shape)

    def _solve(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        network, context = self._network
        cheaper = cache(partial(premasked, network, MaskedLinear))

        def step(x: Tensor, y: Tensor, context: Tensor | None) -> Sequence[Tensor]:
            called = network if torch.is_grad_enabled() else cheaper()
            return self._pass(y, called(x) if context is None else called(x, context=context))

        outputs = solve(self, step, y, context, y.shape[-1], needs_graph(self.owner, y, context))
        if outputs is None:
            return super()._inverse(y)  # type: ignore[misc]
        x, log_scale = (part.reshape(y.shape) for part in outputs)
        self._remember(log_scale)
        return x

    def rows(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Solvable`."""
        rows = y.reshape(-1, y.shape[-1])
        if context is None:
            return rows, None
        width = context.shape[-1]
        if context.shape[:-1].numel() == 1:
            return rows, context.reshape(1, width)
        return rows, context.expand(*y.shape[:-1], width).reshape(-1, width)

    @property
    def _network(self) -> tuple[Any, Tensor | None]:
        """Its network, and the context at which a conditional transform calls it."""
        call = self.arn
        if isinstance(call, partial) and not call.args and list(call.keywords) == ["context"]:
            return call.func, call.keywords["context"]
        return call, None

    @abstractmethod
    def _pass(self, y: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """The next iterate, and what the library keeps for the log-determinant, of what its network gives."""

    @abstractmethod
    def _remember(self, log_scale: Tensor) -> None:
        """Keep it where the library does."""


class AcceleratedAffine(_Accelerated):
    """With the affine transform of each feature.

    The library's loop sets one feature at a time, in the order of the network's permutation, and leaves those after it
    at 0. It ends at the same bits as passes that set all features, if all values are finite.
    """

    is_jacobi = False

    log_scale_min_clip: float
    log_scale_max_clip: float
    _cached_log_scale: Any

    def _pass(self, y: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        mean, log_scale = parameters
        log_scale = clamp_preserve_gradients(log_scale, self.log_scale_min_clip, self.log_scale_max_clip)
        x = (y - mean) * torch.exp(-log_scale)
        return x.contiguous(), log_scale  # the library stacks features, whatever the strides of y

    def first_iterate(self, y: Tensor) -> Tensor:
        """See `Solvable`."""
        return torch.zeros(y.shape, device=y.device)

    def _remember(self, log_scale: Tensor) -> None:
        self._cached_log_scale = log_scale


class AcceleratedSpline(_Accelerated):
    """With the spline of each feature."""

    spline: Any
    _cache_log_detJ: Any  # noqa: N815 (pyro's name)

    def _pass(self, y: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        bins, bound, order = self.spline.count_bins, self.spline.bound, self.spline.order
        spline = ConditionalSpline(lambda _: parameters, y.shape[-1], bins, bound, order).condition(None)
        return spline._inverse(y), spline._cache_log_detJ

    def _remember(self, log_scale: Tensor) -> None:
        self._cache_log_detJ = log_scale


class AcceleratedConditional(ConditionalTransformModule, Swapped):
    """A conditional transform that gives accelerated ones.

    It derives from pyro's class as it is, or Python would refuse to give a module this class.
    """

    def condition(self, context: Float[Tensor, "*batch c"]) -> nn.Module:
        """The transform at a context, as the library's."""
        transform = super().condition(context)  # type: ignore[safe-super]
        of_class = AcceleratedAffine if isinstance(transform, AffineAutoregressive) else AcceleratedSpline
        transform.__dict__["_owner"] = self  # not as a part, of which pyro would learn the parameters twice
        transform.__class__ = of_class.of(type(transform), self.acceleration)
        return transform


ADAPTERS = (
    Adapter(AffineAutoregressive, ("_inverse",), AcceleratedAffine, PYRO),
    Adapter(SplineAutoregressive, ("_inverse",), AcceleratedSpline, PYRO),
    Adapter(ConditionalAffineAutoregressive, ("condition",), AcceleratedConditional, PYRO),
    Adapter(ConditionalSplineAutoregressive, ("condition",), AcceleratedConditional, PYRO),
)
