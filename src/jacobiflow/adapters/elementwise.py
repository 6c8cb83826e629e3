"""What nflows and normflows share: the inverse of an elementwise transform whose parameters a MADE gives."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from types import ModuleType
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.adapters.made import made_network
from jacobiflow.adapters.masked import MaskedNetwork
from jacobiflow.adapters.network import needs_graph, premasked
from jacobiflow.adapters.retry import with_retry
from jacobiflow.adapters.start import Solvable, solve


class AcceleratedInverse(Solvable):
    """A transform whose inverse ends where further passes of the library would change nothing."""

    made: ClassVar[ModuleType]
    """The library's module of its MADE and its layers."""

    autoregressive_net: Any
    _elementwise_inverse: Any

    def inverse(self, inputs: Float[Tensor, "b d"], context: Float[Tensor, "b c"] | None = None) -> Sequence[Tensor]:
        """The x with forward(x) = `inputs`, and log|det dx/dinputs| (B,), as the library's."""
        return tuple(with_retry(type(self)._solve, self, inputs, context))

    def _solve(self, inputs: Float[Tensor, "b d"], context: Float[Tensor, "b c"] | None) -> Sequence[Tensor]:
        cheaper = cache(partial(premasked, self.autoregressive_net, self.made.MaskedLinear))

        def step(x: Tensor, inputs: Tensor, context: Tensor | None) -> Sequence[Tensor]:
            network = self.autoregressive_net if torch.is_grad_enabled() else cheaper()
            return self._elementwise_inverse(inputs, network(x, context))

        graph = needs_graph(self, inputs, context)
        found = solve(self, step, (inputs, context), lambda *given: given, inputs.shape[1:].numel(), graph)
        return super().inverse(inputs, context) if found is None else found  # type: ignore[misc]

    def masked_network(self, features: int, conditional: bool) -> MaskedNetwork | None:
        """See `Solvable`; `None` too where the elementwise transform is not the library's or differs by feature."""
        library = self.made.__name__.split(".")[0]
        given = (getattr(self, "tails", None), getattr(self, "tail_bound", None))
        if self.library_class.__module__.split(".")[0] != library or "_elementwise_inverse" in vars(self):
            return None
        if any(isinstance(part, list | tuple | Tensor) for part in given):
            return None
        return made_network(self.autoregressive_net, self.made, features, conditional)

    def columns(self, y: Float[Tensor, "b k"], parameters: Float[Tensor, "b kp"]) -> Float[Tensor, "b k"]:
        """See `once.Columns`."""
        narrow: Any = object.__new__(self.library_class)
        narrow.__dict__.update(vars(self) | {"features": y.shape[1]})
        return narrow._elementwise_inverse(y, parameters)[0]
