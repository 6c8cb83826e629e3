"""The data of a step: their order, noise and dropped contexts, and the share of each process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from jacobiflow.data.dataset import scale
from jacobiflow.data.noise import Noise, keyed_generator
from jacobiflow.training.config import TrainingConfig
from jacobiflow.training.processes import rank, world_size
from jacobiflow.training.signals import ignore_stop_signals

_STREAM = 0  # The random stream of training; evaluation uses stream 2.

Key: TypeAlias = Sequence[int]
"""The seed of what is random in an item, and the index of the item."""


class Batch(NamedTuple):
    """Data, which contexts are dropped, and the contexts if the data have some."""

    x: Tensor
    is_dropped: Tensor
    context: Tensor | None = None


@dataclass(frozen=True)
class NoisyItems(Dataset[Any]):
    """The items of a data set as a flow sees them.

    An item depends on its key only: not on the process that reads it, nor on those that were read before.

    Args:
        data: A data set. Its items are data, or pairs of data and context. 8-bit images are scaled to [-1, 1].
        transform: Changes the data of an item at random; None changes nothing.
        noise: The noise of the flow's images; None for flows over tokens.
        dropout: Probability of dropping a context.
    """

    data: Any
    transform: Callable[[Any], Tensor] | None = None
    noise: Noise | None = None
    dropout: float = 0.0

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """Returns the items of some keys as a batch."""
        with torch.random.fork_rng(devices=[]):
            items = [self._read(*key) for key in keys]
        x, numbers, *others = map(torch.stack, zip(*items, strict=True))
        x = scale(x) if x.dtype == torch.uint8 else x
        return Batch(x if self.noise is None else self.noise.add(x, numbers), *others)

    def _read(self, seed: int, index: int) -> tuple[Tensor, ...]:
        """Returns the data of an item, the random numbers of its noise, whether its context is dropped, and that."""
        torch.default_generator.manual_seed(seed)
        item = self.data[index]
        x, *context = item if isinstance(item, tuple | list) else (item,)
        x = x if self.transform is None else self.transform(x)
        numbers = torch.empty((), device="cpu") if self.noise is None else self.noise.draw(x.shape)
        is_dropped = torch.rand((), device="cpu") < self.dropout
        return x, numbers, is_dropped, *(torch.as_tensor(each, device="cpu") for each in context)


def keys_of_step(num: int, step: int, config: TrainingConfig) -> list[Key]:
    """Returns the keys of a step, counted from 0, for all processes. An epoch reads all `num` items in a new order."""
    size = config.batch_size
    epoch, batch = divmod(step, num // size)
    return _keys_of_epoch(num, config.seed, epoch)[batch * size : (batch + 1) * size].tolist()


@lru_cache(maxsize=1)
def _keys_of_epoch(num: int, seed: int, epoch: int) -> Tensor:
    generator = keyed_generator(seed, _STREAM, epoch)
    order = torch.randperm(num, generator=generator, device="cpu")
    return torch.stack((torch.randint(2**63 - 1, (num,), generator=generator, device="cpu"), order), dim=1)


def keys_of_process(num: int, steps: range, config: TrainingConfig) -> Iterator[list[Key]]:
    """Yields the keys of this process for each part of each step."""
    for step in steps:
        share = keys_of_step(num, step, config)[rank() :: world_size()]
        for part in range(config.accumulation):
            yield share[part :: config.accumulation]


def load_batches(items: NoisyItems, keys: Iterable[list[Key]], workers: int) -> Iterator[Batch]:
    """Yields a batch for each list of keys, read by worker processes if there are any."""
    loader = DataLoader(
        items, batch_sampler=keys, num_workers=workers, collate_fn=Batch._make,
        worker_init_fn=ignore_stop_signals, pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    with torch.device("cpu"):  # PyTorch draws a seed on the default device.
        batches = iter(loader)
    yield from batches
