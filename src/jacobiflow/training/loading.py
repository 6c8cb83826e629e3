"""The data of a step: their order, noise and dropped labels, and the share of each process."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from jacobiflow.data.dataset import scale
from jacobiflow.data.noise import Noise, keyed_generator, keyed_seed
from jacobiflow.training.config import TrainConfig
from jacobiflow.training.processes import rank, world_size

_ORDER, TRAINING, HELD_OUT = 0, 1, 3  # Random streams; evaluation uses stream 2.
_STRIDE = 0x9E3779B97F4A7C15  # Between the seeds of two items: 2^64 over the golden ratio, odd.

Key: TypeAlias = tuple[int, int]
"""The epoch and the index of an item."""


class Batch(NamedTuple):
    """Data, their context if they have one, and which contexts are dropped."""

    x: Tensor
    context: Tensor | None
    is_dropped: Tensor


@dataclass(frozen=True)
class NoisyItems(Dataset[Any]):
    """The items of a data set as a flow sees them.

    What is random depends on the seed and the key of an item only: not on the process that reads it, nor on those that
    were read before.

    Args:
        data: A data set. Its items are data, or pairs of data and context. 8-bit images are scaled to [-1, 1].
        transform: Changes the data of an item at random; None changes nothing.
        noise: The noise of the flow's images; None for flows over tokens.
        dropout: Probability of dropping a context.
        stream: Number of the random stream.
    """

    data: Any
    transform: Callable[[Any], Tensor] | None
    noise: Noise | None
    dropout: float
    seed: int
    stream: int

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """Returns the items of some keys as a batch."""
        seeds = {epoch: keyed_seed(self.seed, self.stream, epoch) for epoch in {epoch for epoch, _ in keys}}
        generator = torch.default_generator
        state = generator.get_state()
        try:
            rows = []
            for epoch, index in keys:
                # Only the lower 32 bits of a seed count. Multiples of an odd number differ in them.
                generator.manual_seed((seeds[epoch] + _STRIDE * index) % 2**63)
                rows.append(self._read(index))
            columns = zip(*rows, strict=True)
            x, numbers, is_dropped, *context = map(torch.stack, columns)
        finally:
            generator.set_state(state)
        x = scale(x) if x.dtype == torch.uint8 else x
        return Batch(
            x if self.noise is None else self.noise.add(x, numbers), context[0] if context else None, is_dropped
        )

    def _read(self, index: int) -> tuple[Tensor, ...]:
        """Returns the data of an item, the random numbers of its noise, whether its context is dropped, and that."""
        item = self.data[index]
        x, *context = item if isinstance(item, tuple | list) else (item,)
        x = x if self.transform is None else self.transform(x)
        numbers = torch.empty(()) if self.noise is None else self.noise.draw(x.shape)
        return x, numbers, torch.rand(()) < self.dropout, *map(torch.as_tensor, context)


def keys_of_step(num: int, step: int, config: TrainConfig) -> list[Key]:
    """Returns the keys of a step, counted from 0, for all processes. An epoch reads all `num` items in a new order."""
    size = config.batch_size
    epoch, batch = divmod(step, num // size)
    return [(epoch, index) for index in _order(num, config.seed, epoch)[batch * size : (batch + 1) * size]]


def keys_of_process(num: int, steps: range, config: TrainConfig) -> Iterator[list[Key]]:
    """Yields the keys of this process for each part of each step."""
    for step in steps:
        share = keys_of_step(num, step, config)[rank() :: world_size()]
        for part in range(config.accumulation):
            yield share[part :: config.accumulation]


@lru_cache(maxsize=1)
def _order(num: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(num, generator=keyed_generator(seed, _ORDER, epoch)).tolist()


def load_batches(items: NoisyItems, keys: Iterable[list[Key]], workers: int) -> Iterator[Batch]:
    """Yields a batch for each list of keys, read by worker processes if there are any."""
    yield from DataLoader(
        items, batch_sampler=keys, num_workers=workers, collate_fn=Batch._make,
        worker_init_fn=_ignore_signals, pin_memory=torch.cuda.is_available(),
    )  # fmt: skip


def _ignore_signals(worker: int) -> None:
    """Leaves signals to the training process, which needs its workers until the end of the step."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
