"""Which way an inverse takes: the library's loop, passes from 0, or passes from an answer that is right to rounding."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacobiflow.adapters.columns import solve_columns
from jacobiflow.adapters.fixed_point import Pass, Start, invert
from jacobiflow.adapters.layout import FEWEST_UNITS, order_of
from jacobiflow.adapters.masked import MaskedNetwork
from jacobiflow.adapters.network import needs_all_passes
from jacobiflow.adapters.once import solve_once
from jacobiflow.adapters.swapped import Swapped

_FEWEST_ROWS = 300  # below, calls take the time, of which passes from 0 make the fewest
_COSTLY = 8  # parameters of an elementwise transform that takes more time than a network
_TYPICAL_PASSES = 6  # from 0
_FEWEST_PASSES = 6  # from 0: below, none is saved, and comparing iterates costs more than it gains
_DTYPES = (torch.float32, torch.float64)

_other_bits: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()  # ways whose answers were not the library's


class Solvable(Swapped):
    """What a library's accelerated transform says of itself."""

    fewest_steps: ClassVar[tuple[int, int]] = (2, 2)
    """From so many steps affine transforms gain by each unit once: to a tolerance, and with identical bits."""

    refusals: ClassVar[tuple[type[Exception], ...]] = (AssertionError,)
    """Errors of its elementwise inverse at an argument that it cannot invert."""

    is_jacobi: ClassVar[bool] = True
    """True if each pass x <- g(x) of the library's own loop sets all features."""

    @property
    def owner(self) -> nn.Module:
        """The module of the flow that holds its parameters: itself, unless that made it for a context."""
        return vars(self).get("_owner", self)

    def first_iterate(self, y: Tensor) -> Tensor:
        """The x from which the library's own loop starts."""
        return torch.zeros_like(y)

    @abstractmethod
    def masked_network(self, features: int, conditional: bool) -> MaskedNetwork | None:
        """Its network as operations, or `None` where it has others."""

    @abstractmethod
    def columns(self, y: Tensor, parameters: Tensor) -> Tensor:
        """See `once.Columns`."""


def solve(
    module: Solvable,
    step: Pass,
    inputs: tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch c"] | None],
    as_rows: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]],
    passes: int,
    graph: bool,
) -> Sequence[Tensor] | None:
    """The results of the last pass, by the cheapest way; `None` if that is the library's own loop.

    That loop also decides if other passes may spread a value that is not finite in another way, or if a pass from an
    answer is refused.

    `inputs` are y and the context as the library takes them, of which `as_rows` makes (B, D) and (B, C).
    """
    exact = module.acceleration.tolerance == 0
    way = "library"
    # Looking at all modules takes as long as a pass of few features and rows, for which nothing can be gained.
    few = passes < _FEWEST_PASSES and all(t is None or t.shape[:-1].numel() < _FEWEST_ROWS for t in inputs)
    if not (few or needs_all_passes(module.owner, inputs[0], graph)) and (module.is_jacobi or _are_finite(*inputs)):
        rows = as_rows(*inputs)
        start, way = _start(module, *rows, exact=exact)
    if way == "library" or (way == "passes" and passes < _FEWEST_PASSES):
        module.acceleration.count(module.owner, passes, "library")
        return None
    y, context = inputs if exact else rows
    first = start or Start(module.first_iterate(y))
    try:
        outputs, count = invert(step, y, context, passes, module.acceleration.tolerance, graph, first)
    except module.refusals:
        if start is None:  # the library's own passes raise it too
            raise
        outputs, count = (), 1
    # A value that is not finite is the library's if the passes are its own, and in rows that made all passes.
    has_own_passes = module.is_jacobi and (start is None or not exact)
    if not outputs or not (has_own_passes or _are_finite(*outputs)):
        module.acceleration.count(module.owner, count + passes, "library")
        return None
    if exact and start is not None and count > 1 + graph:  # it is not worth trying again
        _other_bits.setdefault(module.owner, set()).add(way)
    module.acceleration.count(module.owner, count, way)
    return outputs


@torch.no_grad()
def _start(
    module: Solvable, y: Float[Tensor, "b d"], context: Float[Tensor, "b c"] | None, exact: bool
) -> tuple[Start | None, str]:
    """An answer to start from, where it costs less than the passes that it saves, and the way to it."""
    network = _network(module, y, context) if len(y) >= _FEWEST_ROWS else None
    order = None if network is None else order_of(module.owner, network)
    if network is None or order is None or len(order.features) == 1:
        return None, "passes"
    if network.outputs.shape[1] < _COSTLY and len(order.features) < module.fewest_steps[exact]:
        return None, "passes"
    ways = ["units"] if not exact or _same_products(network, y) else []
    if exact:
        ways += ["columns"] if network.outputs.shape[1] >= _COSTLY else []
        ways = [way for way in ways if way not in _other_bits.get(module.owner, ())]
    if not ways:
        return None, "passes"
    way = ways[0]
    if not _are_finite(*module.owner.parameters()):
        return None, "passes"
    try:
        if way == "columns":
            x = solve_columns(network, order, y, context, module.columns)
        else:
            x = solve_once(network, order, y, context if exact else _one_row(context), module.columns, exact)
    except module.refusals:  # the library's own passes decide
        return None, "passes"
    limit = torch.finfo(y.dtype).max ** 0.5  # above, iterates of the library may overflow on the way to a finite answer
    is_moderate = torch.stack([(t.abs() <= limit).all(dim=1) for t in (x, y, context) if t is not None]).all(dim=0)
    if exact and not is_moderate.all():
        return None, "passes"
    x[~is_moderate] = 0
    return Start(x, order.features[-1]), way


def _are_finite(*tensors: Tensor | None) -> bool:
    return bool(torch.stack([t.isfinite().all() for t in tensors if t is not None]).all())


def _network(module: Solvable, y: Float[Tensor, "b d"], context: Float[Tensor, "b c"] | None) -> MaskedNetwork | None:
    """The network, where it and the inputs are of one floating type and enough rows to gain by it."""
    if torch.is_autocast_enabled(y.device.type) or y.dtype not in _DTYPES:
        return None
    network = module.masked_network(y.shape[1], context is not None)
    if network is None or len(y) < _fewest_rows(network, y.device):
        return None
    tensors = [*(layer.weight for layer in network.layers), *([] if context is None else [context])]
    return network if all(t.dtype == y.dtype and t.device == y.device for t in tensors) else None


def _same_products(network: MaskedNetwork, y: Tensor) -> bool:
    """Whether some rows of each product may have the bits that they have among all: in float32, of enough rows."""
    return y.dtype == torch.float32 and all(layer.out_features >= FEWEST_UNITS for layer in network.layers)


def _fewest_rows(network: MaskedNetwork, device: torch.device) -> float:
    """The number of rows from which computing each unit once takes less time than passes from 0.

    By microseconds as measured: of a step whatever the number of rows, and of a pass for each row.
    """
    features, parameters = network.outputs.shape
    step = 120 + 8 * parameters
    row = 5e-5 * sum(layer.weight.numel() for layer in network.layers) + 7e-3 * parameters * features
    saved = min(features, _TYPICAL_PASSES) - 2 + 1 / features
    fewest = ((features - 1) * step + 150) / (saved * row)
    return fewest if device.type == "cpu" else 30 * fewest


def _one_row(context: Float[Tensor, "b c"] | None) -> Float[Tensor, "#b c"] | None:
    """One row of the context where all are the same, as where a posterior is sampled."""
    if context is None or (context.stride(0) > 0 and not (context == context[0]).all()):
        return context
    return context[:1]
