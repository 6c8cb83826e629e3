"""pyro: `AffineAutoregressive` and `SplineAutoregressive`, conditional or not, whose slow side is the inverse."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
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

from jacobiflow.adapters.masked import Activation, Linear, MaskedNetwork, Operation, Sum, has_hooks, is_elementwise
from jacobiflow.adapters.network import needs_graph, premasked
from jacobiflow.adapters.start import Solvable, solve
from jacobiflow.adapters.swapped import Adapter, Swapped


class _Accelerated(Solvable):
    """A transform whose inverse ends where further passes would change nothing."""

    arn: Any

    def _inverse(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        network, context = self._network
        cheaper = cache(partial(premasked, network, MaskedLinear))

        def step(x: Tensor, y: Tensor, context: Tensor | None) -> Sequence[Tensor]:
            called = network if torch.is_grad_enabled() else cheaper()
            return self._pass(y, called(x) if context is None else called(x, context=context))

        graph = needs_graph(self.owner, y, context)
        found = solve(self, step, (y, context), _rows, y.shape[-1], graph)
        if found is None:
            return super()._inverse(y)  # type: ignore[misc]
        x, log_scale = (part.reshape(y.shape) for part in found)
        self._remember(log_scale)
        return x

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

    def masked_network(self, features: int, conditional: bool) -> MaskedNetwork | None:
        """See `Solvable`."""
        network, _ = self._network
        if type(network) not in (AutoRegressiveNN, ConditionalAutoRegressiveNN) or has_hooks(network):
            return None
        layers = [*network.layers, *([] if network.skip_layer is None else [network.skip_layer])]
        if any(type(layer) is not MaskedLinear or has_hooks(layer) for layer in layers):
            return None
        if not is_elementwise(network.f):
            return None
        operations: list[Operation] = []
        for layer in network.layers[:-1]:
            operations += [Linear(len(operations), layer), Activation(len(operations) + 1, network.f)]
        operations.append(Linear(len(operations), network.layers[-1]))
        if network.skip_layer is not None:
            operations += [Linear(0, network.skip_layer), Sum(len(operations) + 1, len(operations))]
        outputs = torch.arange(network.layers[-1].out_features, device="cpu").view(-1, features).t()
        start = network.context_dim
        return MaskedNetwork(tuple(operations), slice(start, start + features), outputs)

    def columns(self, y: Float[Tensor, "b k"], parameters: Float[Tensor, "b kp"]) -> Float[Tensor, "b k"]:
        """See `once.Columns`."""
        network, _ = self._network
        given = parameters.unflatten(1, (y.shape[1], -1)).transpose(1, 2)
        split = given.unbind(1) if network.all_ones else [given[:, part] for part in network.param_slices]
        return self._pass(y, split)[0]


def _rows(y: Tensor, context: Tensor | None) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b c"] | None]:
    if context is not None:
        context = context.expand(*y.shape[:-1], context.shape[-1]).reshape(-1, context.shape[-1])
    return y.reshape(-1, y.shape[-1]), context


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
        own = self.spline
        spline = ConditionalSpline(lambda _: parameters, y.shape[-1], own.count_bins, own.bound, own.order).condition(
            None
        )
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
    Adapter(AffineAutoregressive, "_inverse", AcceleratedAffine),
    Adapter(SplineAutoregressive, "_inverse", AcceleratedSpline),
    Adapter(ConditionalAffineAutoregressive, "condition", AcceleratedConditional),
    Adapter(ConditionalSplineAutoregressive, "condition", AcceleratedConditional),
)
