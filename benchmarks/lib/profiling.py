"""Splits the time of a program that trains a flow: optimizer, clipping, data loader, native code, and the rest."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
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
Functions = Mapping[str, Sequence[tuple[Any, str]]]
# Each part's functions: their owner and their name. An optimizer's steps have hooks instead.
FUNCTIONS: Functions = {
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

    Args:
        clock: Returns the time in seconds.
        functions: The functions of each part.

    Attributes:
        seconds: For each phase, the seconds of its parts.
        calls: For each phase, the calls of its parts.
    """

    def __init__(self, clock: Callable[[], float] = process_time, functions: Functions = FUNCTIONS) -> None:
        self.seconds: dict[str, defaultdict[str, float]] = {}
        self.calls: dict[str, Counter[str]] = {}
        self._clock, self._functions, self._since = clock, functions, 0.0
        self._running: list[tuple[str, str]] = []  # phases and parts, the innermost last

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of the program, such as its training. A phase inside another one interrupts it."""
        self._start(name, OTHER)
        try:
            yield
        finally:
            self._stop()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Times the parts until the block ends."""
        with ExitStack() as stack:
            for part, functions in self._functions.items():
                for owner, name in functions:
                    stack.enter_context(patch.object(owner, name, self._timed(part, getattr(owner, name))))
            before = register_optimizer_step_pre_hook(lambda *_: self._start_part(OPTIMIZER))
            after = register_optimizer_step_post_hook(lambda *_: self._stop())
            stack.callback(before.remove)
            stack.callback(after.remove)
            yield

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            self._start_part(part)
            try:
                return function(*arguments, **options)
            finally:
                self._stop()

        return call

    def _start_part(self, part: str) -> None:
        if self._running:
            self._start(self._running[-1][0], part)

    def _start(self, phase: str, part: str) -> None:
        self._switch()
        self._running.append((phase, part))
        self.seconds.setdefault(phase, defaultdict(float))
        self.calls.setdefault(phase, Counter())[part] += 1

    def _stop(self) -> None:
        if self._running:
            self._switch()
            self._running.pop()

    def _switch(self) -> None:
        now = self._clock()
        if self._running:
            phase, part = self._running[-1]
            self.seconds[phase][part] += now - self._since
        self._since = now
