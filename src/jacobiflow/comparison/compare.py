"""Timings that can be compared: samplers interleaved on the same latents, beside two baselines and an encoding pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.comparison.baselines import SEQUENTIAL, original_loop, sequential_samples
from jacobiflow.errors import InputValueError
from jacobiflow.models.flow import Flow
from jacobiflow.sampling.result import Samples
from jacobiflow.utils.progress import Progress
from jacobiflow.utils.timing import Error, Timing, interleave, paired_error

ENCODING_PASS = "encoding pass"


@dataclass(frozen=True)
class Row:
    """One sampler at one batch size.

    Attributes:
        strategy: Its name.
        seconds: For the whole batch.
        error: The difference from the x of the sequential loop.
        x: Images or tokens of its first round.
        samples: With this x; None for an original sampler, which returns x only.
    """

    strategy: str
    seconds: Timing
    error: Error
    x: Float[Tensor, "n ..."]
    samples: Samples | None = None

    @property
    def evaluations_per_token(self) -> float | None:
        """Token evaluations over samples, blocks and tokens: 1 for the sequential loop."""
        if self.samples is None:
            return None
        num, length, _ = self.samples.latents.shape
        return self.samples.token_evaluations / (num * length * len(self.samples.stats))

    @property
    def certificate(self) -> float | None:
        """The largest residual |g(x) - x| of any sample in any block; None if it was not measured."""
        if self.samples is None or self.samples.residual is None:
            return None
        return float(self.samples.residual.max())

    @property
    def exact(self) -> bool:
        """True if every block of every sample was solved token by token."""
        return self.samples is not None and bool(self.samples.exact.all())

    def to_json(self) -> dict[str, Any]:
        """A JSON value: attributes and properties, sweeps by block, and samples that were solved again."""
        samples = self.samples
        return {
            "strategy": self.strategy,
            "seconds": asdict(self.seconds),
            "error": asdict(self.error),
            "network_calls": None if samples is None else samples.network_calls,
            "token_evaluations": None if samples is None else samples.token_evaluations,
            "evaluations_per_token": self.evaluations_per_token,
            "certificate": self.certificate,
            "exact": self.exact,
            "used_fallback": None if samples is None else int(samples.used_fallback.sum()),
            "sweeps": None if samples is None else [block.sweeps for block in samples.stats],
        }


@dataclass(frozen=True)
class Comparison:
    """Samplers at one batch size, from one interleaved run.

    Attributes:
        batch_size: Samples in the batch.
        rows: The original sampler if the flow has one, the sequential loop, then `others`.
        floor: One encoding pass of the batch, each block evaluated once, unguided: no solver is faster.
    """

    batch_size: int
    rows: tuple[Row, ...]
    floor: Timing

    @property
    def original(self) -> str:
        """The name of the original sampler, see `jacobiflow.comparison.baselines.original_loop`."""
        return self.rows[0].strategy

    @property
    def baselines(self) -> tuple[str, ...]:
        """The names of the original sampler and of the sequential loop; one name if they are the same."""
        return tuple(dict.fromkeys((self.original, SEQUENTIAL)))

    @property
    def others(self) -> tuple[Row, ...]:
        """The rows that are no baselines."""
        return self.rows[len(self.baselines) :]

    def row(self, strategy: str) -> Row:
        """The row of that name."""
        return {row.strategy: row for row in self.rows}[strategy]

    def speed_up(self, row: Row, baseline: str) -> float:
        """Returns the median seconds of the row that `baseline` names, over those of `row`."""
        return self.row(baseline).seconds.median / row.seconds.median

    def to_json(self) -> dict[str, Any]:
        """A JSON value: rows with their speed-ups, and the encoding pass."""
        return {
            "batch_size": self.batch_size,
            "rows": [
                row.to_json() | {"speed_up": {name: self.speed_up(row, name) for name in self.baselines}}
                for row in self.rows
            ],
            "encoding_pass": asdict(self.floor),
        }


def compare(
    flow: Flow,
    latents: Float[Tensor, "n t c"],
    context: Tensor | None,
    runs: Mapping[str, Callable[[], Samples]],
    *,
    repeats: int = 5,
    warm_up: bool = True,
    progress: Progress | None = None,
) -> Comparison:
    """Times samplers beside the original sampler, the sequential loop and an encoding pass, in one interleaved run.

    Args:
        flow: The model; its device and its guidance are used.
        latents: Before the prior's scale.
        runs: Samplers by name, for the same latents, context and guidance.
        repeats: Rounds that count, after one that does not, unless `warm_up` is False.
    """
    original, loop = original_loop(flow)
    for name in (original, SEQUENTIAL, ENCODING_PASS):
        if name in runs:
            raise InputValueError(f"run {name!r}: timed in any case; give it another name, or leave it out")
    sequential = partial(sequential_samples, flow, latents, context)
    exact = sequential()
    every: dict[str, Callable[[], Any]] = {
        original: partial(loop, flow, exact.latents, exact.context),
        SEQUENTIAL: sequential,  # in place of the original sampler if the flow has none
        **runs,
        ENCODING_PASS: partial(_encode, flow, exact.x, exact.context),
    }
    seconds, results = interleave(every, repeats, flow.var.device, progress, warm_up)
    rows = []
    for name in dict.fromkeys((original, SEQUENTIAL, *runs)):
        samples = results[name] if isinstance(results[name], Samples) else None
        x = results[name] if samples is None else samples.x
        rows.append(Row(name, seconds[name], paired_error(x, exact.x), x, samples))
    return Comparison(len(latents), tuple(rows), seconds[ENCODING_PASS])


def _encode(flow: Flow, x: Tensor, context: Tensor | None) -> None:
    with torch.no_grad():
        flow.encode(x, context)
