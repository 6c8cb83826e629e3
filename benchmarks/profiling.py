"""Splits the time of a program that trains a flow: optimizer, clipping, data loader, native code, and the rest."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from inspect import isfunction
from time import process_time
from typing import Any
from unittest.mock import patch

import sbi.inference.trainers.base
import torch
from pyro.ops import integrator
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import dataloader

from jacobiflow.native.library import Library

OPTIMIZER, CLIPPING, LOADER, NATIVE, OTHER = "optimizer", "clipping", "data loader", "native code", "other"
POTENTIAL = "gradients of a potential"  # HMC calls them.
# Each part's functions: their owner and their name. An optimizer's steps have hooks instead.
FUNCTIONS: dict[str, list[tuple[Any, str]]] = {
    CLIPPING: [
        (owner, "clip_grad_norm_")
        for owner in (torch.nn.utils, torch.nn.utils.clip_grad, sbi.inference.trainers.base)
    ],
    LOADER: [(dataloader._BaseDataLoaderIter, "__next__"), (dataloader.DataLoader, "__iter__")],
    NATIVE: [(Library, name) for name, value in vars(Library).items() if isfunction(value) and name[0] != "_"],
    POTENTIAL: [(integrator, "potential_grad")],
}  # fmt: skip


class Profile:
    """Seconds and calls of each part of a program, by phase. A part's seconds are without those of the parts inside it.

    Attributes:
        seconds: For each phase, the seconds of its parts.
        calls: For each phase, the calls of its parts.
    """

    def __init__(self, clock: Callable[[], float] = process_time) -> None:
        self.seconds: dict[str, defaultdict[str, float]] = {}
        self.calls: dict[str, Counter[str]] = {}
        self._clock, self._since = clock, 0.0
        self._running: list[tuple[str, str]] = []  # phases and parts, the innermost last

    def _switch(self) -> None:
        now = self._clock()
        if self._running:
            phase, part = self._running[-1]
            self.seconds[phase][part] += now - self._since
        self._since = now

    def start(self, part: str, phase: str | None = None) -> None:
        """Starts a part, of the phase that runs unless another is named."""
        self._switch()
        self._running.append((self._running[-1][0] if phase is None else phase, part))
        phase = self._running[-1][0]
        self.seconds.setdefault(phase, defaultdict(float))
        self.calls.setdefault(phase, Counter())[part] += 1

    def stop(self) -> None:
        """Stops the part that was started last."""
        self._switch()
        self._running.pop()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of the program, such as its training. A phase inside another one interrupts it."""
        self.start(OTHER, name)
        try:
            yield
        finally:
            self.stop()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose calls are timed while a phase runs."""

        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            if not self._running:
                return function(*arguments, **options)
            self.start(part)
            try:
                return function(*arguments, **options)
            finally:
                self.stop()

        return call

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Times the parts until the block ends."""
        with ExitStack() as stack:
            for part, functions in FUNCTIONS.items():
                for owner, name in functions:
                    stack.enter_context(patch.object(owner, name, self.timed(part, getattr(owner, name))))
            before = register_optimizer_step_pre_hook(lambda *_: self.start(OPTIMIZER) if self._running else None)
            after = register_optimizer_step_post_hook(lambda *_: self.stop() if self._running else None)
            stack.callback(before.remove)
            stack.callback(after.remove)
            yield
