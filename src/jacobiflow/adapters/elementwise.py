"""Elementwise transforms of nflows and normflows, whose parameters a MADE gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from types import ModuleType
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.adapters.chain import Library, Link, Values
from jacobiflow.adapters.made import made_attributes, made_network
from jacobiflow.adapters.masked import UnsupportedError
from jacobiflow.adapters.network import needs_graph, premasked
from jacobiflow.adapters.part import Description
from jacobiflow.adapters.passes import Solvable, solve
from jacobiflow.adapters.swapped import Swapped
from jacobiflow.native.structures import Elementwise, Ends


class ElementwiseLibrary(Library):
    """A library whose transforms have methods `forward` and `inverse` that give values and log-determinants."""

    made: ModuleType
    """The library's module of its MADE and its layers."""

    def links(self, module: Any) -> Iterator[Link]:
        """See `Library`."""
        yield module, False

    def call(
        self, module: Any, x: Float[Tensor, "b d"], context: Tensor | None, is_inverse: bool, is_accelerated: bool
    ) -> Values:
        """See `Library`."""
        own = module.library_class if isinstance(module, Swapped) and not is_accelerated else None
        if own is not None:
            return (own.inverse if is_inverse else own.forward)(module, x, context)  # type: ignore[attr-defined]
        return (module.inverse if is_inverse else module)(x, context)

    def masked(self, module: Any, settings: dict[str, Any], parameters: int, is_conditional: bool) -> Description:
        """The description of a transform that a MADE gives the parameters."""
        own = ("_elementwise_forward", "_elementwise_inverse", "_elementwise")
        if any(name in vars(module) for name in own):
            raise UnsupportedError("an elementwise transform of its own")
        names = (*own, "features", "_epsilon", "num_bins", "tails", "tail_bound", "min_bin_width", "min_bin_height",
                 "min_derivative")  # fmt: skip
        made = module.autoregressive_net
        attributes = [(vars(module), name) for name in names] + [(vars(made), "hidden_features")]
        network = made_network(made, self.made, parameters, is_conditional)
        return Description(module, settings, network, attributes=(*attributes, *made_attributes(made)))


def rational_quadratic(module: Any) -> tuple[dict[str, Any], int]:
    """The spline of nflows and normflows, and how many parameters a feature has."""
    if isinstance(module.tails, list | tuple) or isinstance(module.tail_bound, Tensor):
        raise UnsupportedError("a spline with tails of its own for each feature")
    bins, scale = module.num_bins, getattr(module.autoregressive_net, "hidden_features", 1)
    ends = {"linear": Ends.FIXED, "circular": Ends.CIRCULAR}.get(module.tails, Ends.FREE)
    bound = float(module.tail_bound)
    return {
        "kind": Elementwise.RATIONAL_QUADRATIC, "bins": bins, "ends": ends, "end_slope": 1.0,
        "factor": float(scale) ** -0.5, "low": 0.0 if module.tails is None else -bound,
        "high": 1.0 if module.tails is None else bound, "has_tails": module.tails is not None,
        "least_width": module.min_bin_width, "least_height": module.min_bin_height,
        "least_slope": module.min_derivative,
    }, {Ends.FIXED: 3 * bins - 1, Ends.CIRCULAR: 3 * bins, Ends.FREE: 3 * bins + 1}[ends]  # fmt: skip


class AcceleratedTransform(Solvable):
    """A masked transform, by native code or by passes."""

    made: ClassVar[ModuleType]

    autoregressive_net: Any
    _elementwise_inverse: Any

    def forward(self, inputs: Float[Tensor, "b d"], context: Float[Tensor, "b c"] | None = None) -> Sequence[Tensor]:
        """z = `inputs` under the transform and log|det dz/dinputs| (B,), as the library's."""
        result = through_native_code(self, self.library, inputs, context, is_inverse=False)
        return super().forward(inputs, context) if result is None else result

    def inverse(self, inputs: Float[Tensor, "b d"], context: Float[Tensor, "b c"] | None = None) -> Sequence[Tensor]:
        """The x with forward(x) = `inputs`, and log|det dx/dinputs| (B,), as the library's."""
        result = through_native_code(self, self.library, inputs, context, is_inverse=True)
        return tuple(self._solve(inputs, context)) if result is None else result

    def _solve(self, inputs: Float[Tensor, "b d"], context: Float[Tensor, "b c"] | None) -> Sequence[Tensor]:
        cheaper = cache(partial(premasked, self.autoregressive_net, self.made.MaskedLinear))

        def step(x: Tensor, inputs: Tensor, context: Tensor | None) -> Sequence[Tensor]:
            network = self.autoregressive_net if torch.is_grad_enabled() else cheaper()
            return self._elementwise_inverse(inputs, network(x, context))

        graph = needs_graph(self, inputs, context)
        outputs = solve(self, step, inputs, context, inputs.shape[1:].numel(), graph)
        return super().inverse(inputs, context) if outputs is None else outputs  # type: ignore[misc]

    def rows(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Solvable`."""
        return y, context


def through_native_code(
    module: Any, library: Library, x: Tensor, context: Tensor | None, is_inverse: bool
) -> tuple[Tensor, Tensor] | None:
    """Values and log-determinants (B,) by native code; `None` if they are left to the library."""
    if x.ndim != 2 or (context is not None and (context.ndim != 2 or len(context) != len(x))):
        return None
    return module.acceleration.by_native_code(module, library, x, context, is_inverse, "rows")
