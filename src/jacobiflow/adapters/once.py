"""The inverse of a masked autoregressive transform, each hidden unit computed once.

Values are held as (units, samples), so that what a step adds is some rows of each. The arithmetic of all steps is that
of about one pass, instead of one for each feature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jacobiflow.adapters.layout import Layout, Order
from jacobiflow.adapters.masked import Activation, Context, Linear, MaskedNetwork, Sum

Columns = Callable[[Tensor, Tensor], Tensor]
"""y (B, k) and parameters (B, k * P) -> x (B, k): the inverse of the elementwise transform of k features."""

_ROWS = 8192  # solved together on a CPU: few enough for its caches


def solve_once(
    network: MaskedNetwork,
    order: Order,
    y: Float[Tensor, "b d"],
    context: Float[Tensor, "#b c"] | None,
    columns: Columns,
    exact: bool,
) -> Float[Tensor, "b d"]:
    """x of all steps but the last, whose features are 0: the next pass gives them.

    `context` has a row for each row of `y`, or one for all. With `exact` sums are those of the library, term by term,
    so that bits are its own too where the matrix library adds up some rows of a product as it adds up all.
    """
    layout = order.natural if exact else order.sorted
    weights = {
        value: _weights(layout, value, operation)
        for value, operation in enumerate(network.operations, start=1)
        if isinstance(operation, Linear)
    }
    size = _ROWS if y.device.type == "cpu" else len(y)
    parts = []
    for start in range(0, len(y), size):
        rows = slice(start, start + size)
        own = context if context is None or len(context) == 1 else context[rows]
        parts.append(_Solve(network, layout, weights, y[rows], own, columns).run())
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _weights(layout: Layout, value: int, operation: Linear) -> tuple[Tensor, Tensor]:
    """mask * weight and bias (units, 1) of a layer, its units and what it reads in the order of the layout."""
    layer = operation.layer
    weight = (layer.mask * layer.weight).detach()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()
    if layout.units is not None:
        rows = layout.units[value]
        weight, bias = weight[rows][:, layout.units[operation.source]], bias[rows]
    return weight, bias[:, None]


@dataclass
class _Solve:
    """The loop over steps, for rows that are solved together."""

    network: MaskedNetwork
    layout: Layout
    weights: dict[int, tuple[Tensor, Tensor]]
    y: Float[Tensor, "b d"]
    context: Float[Tensor, "#b c"] | None
    columns: Columns

    def run(self) -> Float[Tensor, "b d"]:
        operations, layout, y = self.network.operations, self.layout, self.y.t().contiguous()
        # What later steps read again is kept. Whole rows of weights read what is not known yet by a weight of 0.
        read = {operation.source for operation in operations if isinstance(operation, Linear)}
        new = y.new_zeros if layout.units is None else y.new_empty
        kept = {value: new(layout.sizes[value], y.shape[1]) for value in read}
        if self.context is not None and self.network.width > len(y):
            kept[0][layout.context] = self.context.t()
        given = {
            value: self._given(value, operation)
            for value, operation in enumerate(operations, start=1)
            if isinstance(operation, Context)
        }
        x = torch.zeros_like(y)
        # Without a context, or with one for all rows, what the first step computes is the same for all.
        same = layout.units is not None and (self.context is None or len(self.context) == 1)
        for step, features in enumerate(layout.features[:-1]):
            rows = slice(0, 1) if same and step == 0 else slice(None)
            parameters = self._advance(step, kept, given, rows).t().expand(y.shape[1], -1)
            if layout.units is None:
                parameters = parameters.contiguous()  # as the library has them, as a sum may have another order else
            found = self.columns(y[features].t(), parameters)
            # A single column that is transposed would be copied number by number.
            found = found.reshape(1, -1) if found.shape[1] == 1 else found.t()
            x[features] = kept[0][layout.inputs[step]] = found
        return x.t().contiguous()

    def _given(self, value: int, operation: Context) -> Float[Tensor, " units #b"]:
        given = operation.function(operation.layer(self.context)).t()
        return given if self.layout.units is None else given[self.layout.units[value]]

    def _advance(
        self, step: int, kept: dict[int, Tensor], given: dict[int, Tensor], rows: slice
    ) -> Float[Tensor, "kp b"]:
        """Compute the units of all values that this step is the first to have, for `rows`; those of the last return."""
        new: dict[int, Tensor] = {}
        for value, operation in enumerate(self.network.operations, start=1):
            block = self.layout.blocks[value][step]
            if block.count == 0:
                continue
            source = operation.source
            if isinstance(operation, Linear):
                weight, bias = self.weights[value]
                product = torch.addmm(bias[block.take], weight[block.take, block.read], kept[source][block.read, rows])
                new[value] = product[: block.count]
            elif isinstance(operation, Activation):
                new[value] = self.network.activation(value)(new[source])
            elif isinstance(operation, Sum):
                new[value] = new[operation.other] + new[source]
            else:
                new[value] = _with_context(operation, new[source], given[value][block.rows])
            if value in kept:
                kept[value][block.rows] = new[value]
        return new[len(self.network.operations)]


def _with_context(operation: Context, own: Float[Tensor, "u b"], given: Float[Tensor, " u #b"]) -> Float[Tensor, "u b"]:
    return F.glu(torch.cat((own, given.expand_as(own))), dim=0) if operation.gate else own + given
