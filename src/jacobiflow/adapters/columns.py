"""The inverse of a masked autoregressive transform by passes of its whole network, each for one step's features.

A pass of the library evaluates its network and inverts the elementwise transform of all D features, of which one is
new. Here a pass inverts it for that one. The products are the library's, of the same shapes, in memory that is used
again, so the bits are the library's where some columns of a batch are transformed as they are among all.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jacobiflow.adapters.layout import Order
from jacobiflow.adapters.masked import Activation, Context, Linear, MaskedNetwork
from jacobiflow.adapters.once import Columns


def solve_columns(
    network: MaskedNetwork,
    order: Order,
    y: Float[Tensor, "b d"],
    context: Float[Tensor, "b c"] | None,
    columns: Columns,
) -> Float[Tensor, "b d"]:
    """x of all steps but the last, whose features are 0: the next pass gives them."""
    evaluate = _Network(network, y, context)
    x = evaluate.input[:, network.features]
    for features, parameters in zip(order.features[:-1], order.parameters[:-1], strict=True):
        x[:, features] = columns(y[:, features], evaluate()[:, parameters])
    return x.contiguous()


class _Network:
    """A masked network whose values are (samples, units), in memory that each call writes anew."""

    def __init__(self, network: MaskedNetwork, y: Float[Tensor, "b d"], context: Float[Tensor, "b c"] | None) -> None:
        self.network = network
        layers = network.layers
        self.input = y.new_zeros(len(y), layers[0].in_features)
        if context is not None and layers[0].in_features > y.shape[1]:
            start, stop = network.features.start, network.features.stop
            self.input[:, :start] = context[:, :start]
            self.input[:, stop:] = context[:, start:]
        self.weights = [(layer.mask * layer.weight).detach().t() for layer in layers]
        self.biases = [None if layer.bias is None else layer.bias.detach() for layer in layers]
        self.memory = [y.new_empty(len(y), layer.out_features) for layer in layers]
        self.given = [op.function(op.layer(context)) for op in network.operations if isinstance(op, Context)]

    def __call__(self) -> Float[Tensor, "b dp"]:
        values, layer, given = [self.input], 0, iter(self.given)
        for operation in self.network.operations:
            own = values[operation.source]
            if isinstance(operation, Linear):
                values.append(self._product(layer, own))
                layer += 1
            elif isinstance(operation, Activation):
                values.append(self.network.activation(len(values))(own))
            elif isinstance(operation, Context):
                of_context = next(given)
                values.append(F.glu(torch.cat((own, of_context), dim=1)) if operation.gate else own.add_(of_context))
            else:
                values.append(torch.add(values[operation.other], own, out=own))
        return values[-1]

    def _product(self, layer: int, own: Float[Tensor, "b d"]) -> Float[Tensor, "b e"]:
        bias, out = self.biases[layer], self.memory[layer]
        if bias is None:
            return torch.mm(own, self.weights[layer], out=out)
        return torch.addmm(bias, own, self.weights[layer], out=out)
