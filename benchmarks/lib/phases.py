"""Splits the time of a program that trains a flow into phases."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import process_time
from typing import Any
from unittest.mock import patch

from pyro.ops import integrator
from torch.optim.optimizer import register_optimizer_step_post_hook


class Phases:
    """Seconds and steps of each phase of a program. A phase inside another one interrupts it.

    Args:
        clock: Returns the time in seconds.

    Attributes:
        seconds: Seconds of each phase.
        steps: Steps of optimizers, and gradients of potentials (for HMC), in each phase.
    """

    def __init__(self, clock: Callable[[], float] = process_time) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.steps: Counter[str] = Counter()
        self._clock, self._since = clock, 0.0
        self._running: list[str] = []  # The innermost phase is last.

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of the program, such as its training; also decorates a function."""
        self._add_seconds()
        self._running.append(name)
        try:
            yield
        finally:
            self._add_seconds()
            self._running.pop()

    @contextmanager
    def counting_steps(self) -> Iterator[None]:
        """Counts the steps of each phase until the block ends."""
        gradient = integrator.potential_grad

        def counted_gradient(*arguments: Any) -> Any:
            self._count_step()
            return gradient(*arguments)

        hook = register_optimizer_step_post_hook(lambda *_: self._count_step())
        with patch.object(integrator, "potential_grad", counted_gradient):
            try:
                yield
            finally:
                hook.remove()

    def _count_step(self) -> None:
        if self._running:
            self.steps[self._running[-1]] += 1

    def _add_seconds(self) -> None:
        now = self._clock()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now
