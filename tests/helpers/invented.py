"""Hand-made pieces and reports, and a machine whose clock only the network moves."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import jacobiflow as jf
from jacobiflow.calibration.convergence import TOLERANCES, ConvergenceCurve
from jacobiflow.calibration.metrics import NORMS, Components, Metrics
from jacobiflow.calibration.report import GUESSES, CalibrationSettings
from jacobiflow.models.checkpoints.fingerprint import fingerprint
from jacobiflow.native import SWITCH
from tests.helpers.problems import make_flow, to_float32

TOKENS, CHANNELS = 16, 4  # of `small`
GUIDANCE = jf.Guidance(0.4, annealed=False, on="shift", attn_temperature=0.9)


@cache
def small(seed: int = 0) -> jf.TarFlow:
    """A float32 flow of three classes and two blocks; not to be changed."""
    return to_float32(make_flow(num_classes=3, seed=seed))


@jf.register_piece("Stretched")
@dataclass(frozen=True)
class Stretched(jf.Partition):
    """A partition of a reader's own."""

    first: int
    then: int = 2

    def __post_init__(self) -> None:
        if self.first < 1:
            raise ValueError(f"Stretched: first={self.first}: give 1 or more")

    def stop(self, front: int, num_tokens: int) -> int:
        return min(front + (self.then if front else self.first), num_tokens)


@jf.register_piece("halfway")
@dataclass(frozen=True)
class Halfway(jf.Guess):
    """A guess of a reader's own."""

    percent: int

    def __call__(self, z: Tensor) -> Tensor:
        return self.percent / 100 * z


def counted(partition: jf.Partition, sweeps: int | tuple[int, ...]) -> jf.Solver:
    """So many sweeps, or fewer by the early stop of the paper's Algorithm 1."""
    return jf.Solver(partition, stopping=jf.Stopping(sweeps, 1e-8))


Counts = Sequence[int | None]


def curve_of(counts: Mapping[float, Counts]) -> ConvergenceCurve:
    """A curve that reaches the tolerances after these numbers of sweeps, one for each sample."""
    return ConvergenceCurve((1.0, 0.0), (1.0, 0.0), {tolerance: tuple(each) for tolerance, each in counts.items()})


def same(*counts: int | None) -> ConvergenceCurve:
    """The same numbers for every tolerance."""
    return curve_of(dict.fromkeys(TOLERANCES, counts))


def igm(latent: float, zeros: float) -> dict[str, float]:
    return {"latent": latent, "zeros": zeros}


def make_report(
    crm: Sequence[float], igms: Sequence[Mapping[str, float]] = (),
    noise: Sequence[Mapping[str, ConvergenceCurve]] = (),
    segments: Mapping[int, Mapping[int, Sequence[ConvergenceCurve]]] | None = None, num_tokens: int = 16, norm: Any = 2,
) -> jf.CalibrationReport:  # fmt: skip
    """A report with what a strategy needs of one, and other numbers in the norms that its settings do not name."""
    igms = igms or [igm(1, 2)] * len(crm)
    metrics = Metrics(tuple(igms), tuple(Components(value, 1.0, 0.0) for value in crm))
    others = Metrics((igm(2, 1),) * len(crm), None)
    noise = noise or [dict.fromkeys(GUESSES, same(min(4, num_tokens), min(6, num_tokens)))] * len(crm)
    return jf.CalibrationReport(
        fingerprint=fingerprint(small()), num_tokens=num_tokens, token_dim=CHANNELS,
        settings=CalibrationSettings(8, False, norm, None, 8, 2, 0),
        metrics={name: metrics if name == norm else others for name in NORMS},
        segment_metrics={0: Metrics((igm(1, 2),) * 8, None)}, class_metrics={},
        curves={"noise": tuple(noise)},
        segment_curves={block: {g: tuple(row) for g, row in rows.items()} for block, rows in (segments or {}).items()},
        gamma=((1.0,),) * len(crm),
    )  # fmt: skip


def draw(flow: jf.TarFlow, strategy: Any, latents: int | Tensor, **named: Any) -> jf.Samples:
    """Samples of all classes in turn."""
    num, given = (latents, {}) if isinstance(latents, int) else (len(latents), {"latents": latents})
    labels = torch.arange(num) % flow.config.num_classes
    return jf.sample(flow, None if given else num, labels, strategy=strategy, **given, **named)


@dataclass
class Machine:
    """A device whose time passes in calls of a block's network only.

    One takes `call` seconds, and `token` more for each token of each sample; in bfloat16 `low` times as long; with a
    front per sample `own` seconds more. Several tokens at once take `slower[i]` times as long in block i. What starts
    with an empty cache is as fast as the next of `moods`, in turn, says.
    """

    call: float = 1.0
    token: float = 0.0
    low: float = 1e3
    own: float = 0.0
    slower: Mapping[int, float] = field(default_factory=dict)
    moods: Sequence[float] = (1.0,)
    now: float = 0.0

    def carry(self, flow: jf.TarFlow, monkeypatch: pytest.MonkeyPatch) -> jf.TarFlow:
        """A copy of the flow that this machine runs, call by call; its clock is Python's from now on."""
        monkeypatch.setenv(SWITCH, "0")
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        self._moods, self._mood, self._lowered = itertools.cycle(self.moods), 1.0, None
        flow = copy.deepcopy(flow)
        for i, block in enumerate(flow.blocks):
            self._take(block, self.slower.get(i, 1.0))
        return flow

    def seconds(self, rows: int, *sizes: float) -> float:
        """Of calls on so many tokens each."""
        return sum(self.call + self.token * rows * size for size in sizes)

    def _take(self, block: Any, slower: float) -> None:
        affine, affine_at, affine_whole = block.affine, block.affine_at, block.affine_whole
        init_cache, to_bf16 = block.init_cache, block.to_bf16

        def spend(rows: int, size: int, cache: Any) -> None:
            low = 1.0 if self._lowered is None or cache is not self._lowered else self.low
            self.now += self.seconds(rows, size) * low * (slower if size > 1 else 1.0) * self._mood

        def timed(x: Any, start: int, stop: int, cache: Any) -> Any:
            spend(len(x), stop - start, cache)
            return affine(x, start, stop, cache)

        def timed_at(x: Any, start: Any, size: int, end: int, cache: Any) -> Any:
            spend(len(x), size, cache)
            self.now += self.own * self._mood
            return affine_at(x, start, size, end, cache)

        def started_whole(x: Any, *others: Any) -> Any:
            self._mood = next(self._moods)
            spend(len(x), x.shape[1], None)
            return affine_whole(x, *others)

        def started(*arguments: Any, **named: Any) -> Any:
            self._mood = next(self._moods)
            return init_cache(*arguments, **named)

        def lowered(cache: Any) -> Any:
            self._lowered = to_bf16(cache)
            return self._lowered

        block.affine, block.affine_at, block.affine_whole = timed, timed_at, started_whole
        block.init_cache, block.to_bf16 = started, lowered
