"""The description of a network: its operations, and the order in which native code computes its units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jacobiflow.errors import UnsupportedError
from jacobiflow.native.boundary import Activation, Operation, OperationKind
from jacobiflow.native.tensors import is_plain

Place = tuple[dict[str, Any], str]
"""A place of a tensor: a dictionary of a module, such as its parameters, and a name in it."""

Units = tuple[Sequence[int], Sequence[int]]
"""The units of a value, sorted by the first step that can compute them, and how many each step can compute."""


class MaskedNetwork:
    """A network of masked or dense layers, whose outputs are the parameters of an elementwise transform of features.

    Value 0 is the input: features and, in some networks, the context. Each method adds an operation, and returns
    the index of the value that it computes. The last value holds the parameters of all features. Where a method takes
    `activation`, it takes the fields of `boundary.Operation` that describe one. Weights and biases are not part of the
    description: native code gets them with each call, in the order of `shapes`.

    Args:
        outputs: The units of the last value that hold the P parameters of each transformed feature (D, P), on the CPU.
        context_columns: The columns of the input that are context. The others are features.
        inputs: The number of features that it reads; by default those that it transforms.

    Attributes:
        operations: The operations.
        masks: The mask of each operation's weight, or `None`.
        shapes: The shapes of the weights and biases of all operations, a weight before its bias.
        places: Where these are, if they are those of a library's modules.
        context: The width of the context.
        groups: The group of each value, as a number. Elementwise operations connect the values of a group, so that
            native code computes the same units of all of them in a step.

    Example:
        >>> network = MaskedNetwork(torch.tensor([[0, 1], [2, 3]]))  # a scale and a shift of two features
        >>> reads_first = torch.tensor([[True, False]])
        >>> hidden = network.add_linear(0, 8, reads_first.repeat(8, 1))
        >>> network.add_linear(hidden, 4, torch.tensor([[False], [False], [True], [True]]).repeat(1, 8))
        2
        >>> find_order(network).features
        [0, 1]
    """

    def __init__(
        self, outputs: Int[Tensor, "d p"], context_columns: range = range(0), inputs: int | None = None
    ) -> None:
        self.outputs, self.context_columns, self.context = outputs, context_columns, len(context_columns)
        self.inputs = len(outputs) if inputs is None else inputs
        self.operations: list[Operation] = []
        self.masks: list[Tensor | None] = []
        self.shapes: list[tuple[int, ...]] = []
        self.places: list[Place] = []
        self.groups = [0]

    @property
    def feature_columns(self) -> list[int]:
        """The columns of the input that are features."""
        return [column for column in range(self.num_units(0)) if column not in self.context_columns]

    def num_units(self, value: int) -> int:
        """Returns the number of units of a value."""
        return self.operations[value - 1].units if value else self.inputs + len(self.context_columns)

    def add_linear(
        self, source: int, units: int, mask: Bool[Tensor, "o i"] | None = None, has_bias: bool = True, **activation: Any
    ) -> int:
        """Adds activation(x (mask * weight)^T + bias). The mask is on the CPU; a dense layer has none."""
        weight = (units, self.num_units(source))
        if mask is not None and (not is_plain(mask, torch.bool) or mask.shape != weight):
            raise UnsupportedError("a mask of another shape than its weight")
        if source:
            self.operations[source - 1].is_kept = True
        self.groups.append(max(self.groups) + 1)
        return self._add(OperationKind.LINEAR, source, weight, has_bias, mask, **activation)

    def add_activation(self, source: int, **activation: Any) -> int:
        """Adds activation(x)."""
        self.groups.append(self.groups[source])
        return self._add(OperationKind.ACTIVATION, source, **activation)

    def add_sum(self, source: int, other: int) -> int:
        """Adds the sum of two values."""
        self._connect(source, other)
        return self._add(OperationKind.SUM, source, other=other)

    def add_guidance(self, source: int, other: int) -> int:
        """Adds x + bias (x - other), where the bias has the guidance weight of each unit."""
        self._connect(source, other)
        return self._add(OperationKind.GUIDANCE, source, has_bias=True, other=other)

    def add_context(
        self, source: int, width: int, has_bias: bool = True, is_gate: bool = False, **activation: Any
    ) -> int:
        """Adds x + activation(context weight^T + bias), or for a gate x * sigmoid(context weight^T + bias)."""
        if self.context not in (0, width):
            raise UnsupportedError("contexts of several widths")
        self.context = width
        self.groups.append(self.groups[source])
        weight = (self.num_units(source), width)
        if is_gate:
            return self._add(OperationKind.GATE_CONTEXT, source, weight, has_bias, activation=Activation.SIGMOID)
        return self._add(OperationKind.ADD_CONTEXT, source, weight, has_bias, **activation)

    def _connect(self, source: int, other: int) -> None:
        """Adds a value to the group of two others, which become one group."""
        if self.num_units(source) != self.num_units(other) or 0 in (source, other):
            raise UnsupportedError("a sum of values of other sizes, or of the input")
        joined, absorbed = self.groups[source], self.groups[other]
        self.groups = [*(joined if group == absorbed else group for group in self.groups), joined]

    def _add(
        self, kind: OperationKind, source: int, weight: tuple[int, ...] | None = None, has_bias: bool = False,
        mask: Tensor | None = None, **fields: Any,
    ) -> int:  # fmt: skip
        """Adds an operation with a weight of this shape, if it has one."""
        units = weight[0] if weight else self.num_units(source)
        operation = Operation(kind=kind, source=source, units=units, weight=-1, bias=-1, **fields)
        if weight:
            operation.weight = len(self.shapes)
            self.shapes.append(weight)
        if has_bias:
            operation.bias = len(self.shapes)
            self.shapes.append((units,))
        self.operations.append(operation)
        self.masks.append(mask)
        return len(self.operations)


class Order(NamedTuple):
    """The steps in which a transform is computed. The features of a step depend on those of earlier steps only.

    Attributes:
        features: The features, sorted by step.
        starts: The position in `features` at which each step starts, and D at the end.
        units: The units of each value of the network. Those of the last are the parameters, feature by feature.
    """

    features: Sequence[int]
    starts: Sequence[int]
    units: Sequence[Units]


def coupling_order(network: MaskedNetwork, identity: Sequence[int], transformed: Sequence[int]) -> Order:
    """Returns the steps of a coupling: the features that stay as they are, which its network reads, and the others."""
    features, outputs = [*identity, *transformed], network.outputs.flatten().tolist()
    last = len(network.operations)
    if (
        sorted(features) != list(range(len(features))) or len(identity) != network.inputs
        or len(transformed) != len(network.outputs) or sorted(outputs) != list(range(network.num_units(last)))
    ):  # fmt: skip
        raise UnsupportedError("a network of other sizes than its coupling")
    steps = [len(identity), len(features)] if identity else [len(features)]

    def units(rows: Sequence[int], first: int) -> Units:
        return rows, [first, len(rows)][-len(steps) :]

    context = [*network.context_columns]
    values = [units(range(network.num_units(value)), 0) for value in range(1, last)]
    return Order(
        features, [0, *steps], [units(context + network.feature_columns, len(context)), *values, units(outputs, 0)]
    )


def find_order(network: MaskedNetwork) -> Order:
    """Returns the steps of a masked transform. Raises UnsupportedError if its network is not autoregressive."""
    # In NumPy, since these are few numbers.
    last, outputs, dependencies = network.groups[-1], network.outputs.numpy(), _find_dependencies(network)
    if not np.array_equal(np.sort(outputs, axis=None), np.arange(len(dependencies[last]))):
        raise UnsupportedError("outputs that are not the parameters of all features")
    step_of = _find_steps(dependencies[last][outputs].max(axis=1) > 0)
    features, num_steps = step_of.argsort(kind="stable"), int(step_of.max()) + 1
    first_steps = {group: (reads * (step_of + 1)).max(axis=1).astype(int) for group, reads in dependencies.items()}
    first_steps[last][outputs] = step_of[:, None]
    rows = {group: first.argsort(kind="stable") for group, first in first_steps.items()}
    rows[last] = outputs[features].ravel()
    units = {group: (rows[group].tolist(), _count_units(first_steps[group], num_steps)) for group in rows}
    starts = [0, *_count_units(step_of, num_steps)]
    return Order(features.tolist(), starts, [units[group] for group in network.groups])


def _count_units(first_steps: Int[np.ndarray, " units"], num_steps: int) -> list[int]:
    """Returns, for each step, the number of units whose first step is this one or an earlier one."""
    counts: list[int] = np.bincount(first_steps, minlength=num_steps).cumsum()[:num_steps].tolist()
    return counts


def _find_dependencies(network: MaskedNetwork) -> dict[int, Float[np.ndarray, "units d"]]:
    """Returns for each group which of its units depend on which features, as 1 or 0, by any path through the masks.

    A residual block adds to a value that it has read, so the paths are followed until nothing changes.
    """
    columns, groups = network.feature_columns, network.groups
    reads = {
        group: np.zeros((network.num_units(value), len(columns)), np.float32) for value, group in enumerate(groups)
    }
    reads[groups[0]][columns] = np.eye(len(columns))
    masks = [
        np.ones((operation.units, network.num_units(operation.source))) if mask is None else mask.numpy()
        for operation, mask in zip(network.operations, network.masks, strict=True)
    ]
    sources, is_changed = set[int](), True
    while is_changed:
        is_changed = False
        sources.clear()
        for operation, mask, group in zip(network.operations, masks, groups[1:], strict=True):
            if operation.kind == OperationKind.LINEAR:
                source = groups[operation.source]
                sources.add(source)
                now = np.maximum(reads[group], mask.astype(np.float32) @ reads[source] > 0)
                is_changed |= group in sources and not np.array_equal(now, reads[group])
                reads[group] = now
    if groups[-1] in sources:
        raise UnsupportedError("layers that read the outputs")
    return reads


def _find_steps(dependencies: Bool[np.ndarray, "d d"]) -> Int[np.ndarray, " d"]:
    """Returns the step at which each feature can be solved."""
    readers = np.ascontiguousarray(dependencies.T)
    step_of, missing, step = np.full(len(readers), -1), readers.sum(axis=0), 0
    while len(solvable := np.flatnonzero(missing == 0)):
        step_of[solvable], missing[solvable] = step, -1
        missing -= readers[solvable].sum(axis=0)
        step += 1
    if (step_of < 0).any():
        raise UnsupportedError("a network that is not autoregressive")
    return step_of
