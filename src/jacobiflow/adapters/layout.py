"""What the masks of a network say of the order in which its units can be computed, and how they are then laid out."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from jacobiflow.adapters.masked import Linear, MaskedNetwork, Sum

Index = slice | Tensor

FEWEST_UNITS = 16  # of a product: matrix libraries add up in another order for fewer


@dataclass(frozen=True)
class Block:
    """What one step adds to one value: its units `take` of the weights, of which `count` are new, from units `read`.

    They are kept in `rows`.
    """

    count: int
    take: Index
    read: slice
    rows: Index


@dataclass(frozen=True)
class Layout:
    """How values (units, samples) are held.

    **Attributes:**

    - `features`: the features of each step; `inputs`: the rows of the input that hold them; `context`: the others.
    - `units`: for each value, its units in the order of its rows; `None` if that is the network's own.
    - `sizes`: how many rows each value has; `blocks`: for each value, what each step adds.
    """

    features: tuple[Index, ...]
    inputs: tuple[Index, ...]
    context: Index
    units: tuple[Tensor, ...] | None
    sizes: tuple[int, ...]
    blocks: tuple[tuple[Block, ...], ...]


class Order:
    """When the units of a masked network can be computed.

    **Attributes:**

    - `features`: those that each step solves, whose parameters depend on those of earlier steps only.
    - `parameters`: for each step, the k * P units that hold the parameters of its features.
    """

    def __init__(self, network: MaskedNetwork, level: Int[Tensor, " d"]) -> None:
        self._device = network.layers[0].mask.device
        self._sources = tuple(operation.source for operation in network.operations)
        self._ready = _first_steps(network, level)  # of each value, the step before which each unit is known
        self._outputs, self._start = network.outputs, network.features.start
        self._steps = [(level == step).nonzero().flatten() for step in range(int(level.max()) + 1)]
        self.features = tuple(self._index(solved) for solved in self._steps)
        self.parameters = tuple(self._index(self._outputs[solved].flatten()) for solved in self._steps)

    def _index(self, indices: Int[Tensor, " k"]) -> Index:
        """The same indices as a slice where they are evenly spaced: indexing with a slice copies nothing."""
        numbers = indices.tolist()
        stride = numbers[1] - numbers[0] if len(numbers) > 1 else 1
        if numbers and stride > 0 and numbers == list(range(numbers[0], numbers[-1] + 1, stride)):
            return slice(numbers[0], numbers[-1] + 1, stride)
        return indices.to(self._device)

    def _units(self, value: int, step: int) -> Int[Tensor, " k"]:
        """The units of a value that are first known before `step`; parameters feature by feature."""
        if self._ready[value] is self._ready[-1]:
            return self._outputs[self._steps[step]].flatten()
        return (self._ready[value] == step).nonzero().flatten()

    @cached_property
    def sorted(self) -> Layout:
        """Units by step, so that a step adds a run of rows to each value, and reads the rows above only."""
        steps, context = range(len(self._steps)), int((self._ready[0] == 0).sum())
        counts = [[int((ready <= step).sum()) for step in steps] for ready in self._ready]
        units = [ready.argsort(stable=True) for ready in self._ready]
        parameters = self._outputs[torch.cat(self._steps)].flatten()
        units = [parameters if self._ready[value] is self._ready[-1] else own for value, own in enumerate(units)]
        blocks = []
        for own, source in zip(counts, (0, *self._sources), strict=True):
            runs = [slice(start, stop) for start, stop in zip([0, *own], own, strict=False)]
            blocks.append(
                tuple(Block(run.stop - run.start, run, slice(0, counts[source][k]), run) for k, run in enumerate(runs))
            )
        inputs = tuple(slice(counts[0][k], counts[0][k] + len(self._steps[k])) for k in steps)
        sizes = (len(self._ready[0]), *(own[-1] for own in counts[1:]))
        moved = tuple(own.to(self._device) for own in units)
        return Layout(self.features, inputs, slice(0, context), moved, sizes, tuple(blocks))

    @cached_property
    def natural(self) -> Layout:
        """Units as they are, and products of whole rows of the weights, which add up in the order of the library's."""
        blocks = []
        for value in range(len(self._ready)):
            own = [self._units(value, step) for step in range(len(self._steps))]
            blocks.append(tuple(self._block(units) for units in own))
        inputs = tuple(self._index(self._start + solved) for solved in self._steps)
        context = self._index((self._ready[0] == 0).nonzero().flatten())
        return Layout(self.features, inputs, context, None, tuple(map(len, self._ready)), tuple(blocks))

    def _block(self, units: Int[Tensor, " k"]) -> Block:
        enough = units.repeat(-(-FEWEST_UNITS // max(len(units), 1)))
        return Block(
            len(units), self._index(enough if len(units) < FEWEST_UNITS else units), slice(None), self._index(units)
        )


_Key = list[tuple[Tensor, int]]
_known: WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], _Key, Order | None]] = WeakKeyDictionary()
_lock = threading.Lock()


def order_of(owner: nn.Module, network: MaskedNetwork) -> Order | None:
    """The order of the units of `network`, which is kept for `owner` until a mask is replaced or changed.

    `None` where a feature depends on itself, so that the network is not autoregressive, and where a mask keeps no
    record of its changes, as it was made under `torch.inference_mode`.
    """
    masks = [layer.mask for layer in network.layers]
    if any(mask.is_inference() for mask in masks):
        return None
    wiring, key = tuple(operation.source for operation in network.operations), [(mask, mask._version) for mask in masks]
    with _lock:
        found = _known.get(owner)
    if found is None or found[0] != wiring or not _same(found[1], key):
        found = (wiring, key, _find_order(network))
        with _lock:
            _known[owner] = found
    return found[2]


def _same(old: _Key, new: _Key) -> bool:
    return len(old) == len(new) and all(a is b and was == now for (a, was), (b, now) in zip(old, new, strict=True))


@torch.no_grad()
def _find_order(network: MaskedNetwork) -> Order | None:
    level = _levels(_dependencies(network)[network.outputs].any(dim=1))
    return None if level is None else Order(network, level)


def _dependencies(network: MaskedNetwork) -> Bool[Tensor, "units d"]:
    """Which features each unit of the last value depends on, by any path through the masks."""
    features = len(network.outputs)
    value = torch.zeros(network.width, features, dtype=torch.float32, device="cpu")
    value[network.features] = torch.eye(features, dtype=value.dtype, device="cpu")
    values = [value]
    for operation in network.operations:
        value = values[operation.source]
        if isinstance(operation, Linear):
            value = ((operation.layer.mask != 0).to(value) @ value > 0).to(value)
        elif isinstance(operation, Sum):
            value = torch.maximum(value, values[operation.other])
        values.append(value)
    return values[-1].bool()


def _levels(needs: Bool[Tensor, "d d"]) -> Int[Tensor, " d"] | None:
    """The step at which each feature can be solved; `None` where features depend on each other in a circle."""
    level = torch.full((len(needs),), -1, device="cpu")
    missing, step = needs.sum(dim=1), 0
    while (level < 0).any():
        ready = (missing == 0) & (level < 0)
        if not ready.any():
            return None
        level[ready] = step
        missing = missing - needs[:, ready].sum(dim=1)
        step += 1
    return level


def _first_steps(network: MaskedNetwork, level: Int[Tensor, " d"]) -> list[Int[Tensor, " units"]]:
    """The first step before which each unit of each value can be computed.

    Values that elementwise operations connect share one tensor, as a unit of one of them is a unit of all. A residual
    block may so delay its own input: the steps are the least that satisfy all operations.
    """
    of_input = torch.zeros(network.width, dtype=torch.long, device="cpu")
    of_input[network.features] = level + 1
    of_output = torch.empty(network.outputs.numel(), dtype=torch.long, device="cpu")
    of_output[network.outputs] = level[:, None]
    ready = [of_input]
    for operation in network.operations:
        if isinstance(operation, Linear):
            ready.append(torch.zeros(len(operation.layer.mask), dtype=torch.long, device="cpu"))
        else:
            ready.append(ready[operation.source])
        if isinstance(operation, Sum):
            ready = [ready[-1] if steps is ready[operation.other] else steps for steps in ready]
    last = ready[-1]
    last.copy_(of_output)
    while True:
        before = [steps.clone() for steps in ready]
        for value, operation in enumerate(network.operations, start=1):
            if isinstance(operation, Linear) and ready[value] is not last:
                read = (operation.layer.mask != 0).cpu() * ready[operation.source]
                torch.maximum(ready[value], read.amax(dim=1), out=ready[value])
        if all(torch.equal(old, new) for old, new in zip(before, ready, strict=True)):
            return ready
