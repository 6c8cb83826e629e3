"""What nflows and normflows share: the inverse of an elementwise transform whose parameters a MADE gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from jacobiflow.adapters.fixed_point import invert
from jacobiflow.adapters.modules import Swapped, by_library, masked_once, needs_graph


class Accelerated(Swapped):
    """A transform whose inverse ends where the library's own passes change nothing more."""

    autoregressive_net: Any
    _elementwise_inverse: Any

    def inverse(self, inputs: Float[Tensor, "b d"], context: Float[Tensor, "b c"] | None = None) -> Sequence[Tensor]:
        """The x with forward(x) = `inputs`, and log|det dx/dinputs| (B,), as the library's."""
        passes = inputs.shape[1:].numel()
        if by_library(self, passes):
            self.acceleration.count(self, passes)
            return super().inverse(inputs, context)  # type: ignore[misc]

        def step(x: Tensor, inputs: Tensor, context: Tensor | None) -> Sequence[Tensor]:
            return self._elementwise_inverse(inputs, self.autoregressive_net(x, context))

        tolerance = self.acceleration.tolerance
        with masked_once():
            outputs, passes = invert(step, inputs, context, passes, tolerance, needs_graph(self, inputs, context))
        self.acceleration.count(self, passes)
        return tuple(outputs)
