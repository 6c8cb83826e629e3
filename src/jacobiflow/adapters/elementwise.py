"""What nflows and normflows share: the inverse of an elementwise transform whose parameters a MADE gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacobiflow.adapters.fixed_point import invert
from jacobiflow.adapters.network import needs_all_passes, needs_graph, premasked
from jacobiflow.adapters.swapped import Swapped


class AcceleratedInverse(Swapped):
    """A transform whose inverse ends where further passes of the library would change nothing."""

    masked_linear: ClassVar[type[nn.Module]]
    autoregressive_net: Any
    _elementwise_inverse: Any

    def inverse(self, inputs: Float[Tensor, "b d"], context: Float[Tensor, "b c"] | None = None) -> Sequence[Tensor]:
        """The x with forward(x) = `inputs`, and log|det dx/dinputs| (B,), as the library's."""
        passes = inputs.shape[1:].numel()
        graph = needs_graph(self, inputs, context)
        if needs_all_passes(self, inputs, passes, graph):
            self.acceleration.count(self, passes)
            return super().inverse(inputs, context)  # type: ignore[misc]
        cheaper = premasked(self.autoregressive_net, self.masked_linear)

        def step(x: Tensor, inputs: Tensor, context: Tensor | None) -> Sequence[Tensor]:
            network = self.autoregressive_net if torch.is_grad_enabled() else cheaper
            return self._elementwise_inverse(inputs, network(x, context))

        outputs, passes = invert(step, inputs, context, passes, self.acceleration.tolerance, graph)
        self.acceleration.count(self, passes)
        return tuple(outputs)
