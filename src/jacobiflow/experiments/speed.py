"""Timings that can be compared: samplers in turn on the same latents, beside two baselines and a floor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.baselines import SEQUENTIAL, original_loop
from jacobiflow.errors import InputValueError
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.guidance import Guidance
from jacobiflow.measuring import Error, Timing, interleave, paired_error
from jacobiflow.sampling import Samples, sample

ENCODING_PASS = "encoding pass"


@dataclass(frozen=True)
class Row:
    """One sampler at one batch size.

    **Attributes:**

    - `strategy`: its name.
    - `seconds`: a `Timing` of the whole batch.
    - `error`: an `Error` against the sequential answer.
    - `samples`: the `Samples` of its warm-up; `None` where it gives images only, as an original code's loop does.
    """

    strategy: str
    seconds: Timing
    error: Error
    samples: Samples | None

    @property
    def network_calls(self) -> int | None:
        """Network calls over all blocks, those of the certificate included."""
        return None if self.samples is None else self.samples.network_calls

    @property
    def token_evaluations(self) -> int | None:
        """Tokens times samples over these calls."""
        return None if self.samples is None else self.samples.token_evaluations

    @property
    def evaluations_per_token(self) -> float | None:
        """Token evaluations over samples, blocks and tokens: 1 for the sequential loop."""
        if self.samples is None:
            return None
        num, length, _ = self.samples.latents.shape
        return self.samples.token_evaluations / (num * length * len(self.samples.stats))

    @property
    def certificate(self) -> float | None:
        """The largest residual |g(x) - x| of any sample in any block; `None` where it was not asked for."""
        if self.samples is None or self.samples.certificate is None:
            return None
        return float(self.samples.certificate.max())

    @property
    def exact(self) -> bool:
        """Whether every sample is exact by construction, each block solved token by token."""
        return self.samples is not None and bool(self.samples.exact.all())

    def to_json(self) -> dict[str, Any]:
        """A JSON value: the attributes and properties, sweeps by block, and samples that were solved again."""
        samples = self.samples
        return {
            "strategy": self.strategy,
            "seconds": asdict(self.seconds),
            "error": asdict(self.error),
            "network_calls": self.network_calls,
            "token_evaluations": self.token_evaluations,
            "evaluations_per_token": self.evaluations_per_token,
            "certificate": self.certificate,
            "exact": self.exact,
            "resolved_sequentially": None if samples is None else samples.resolved_sequentially,
            "sweeps": None if samples is None else [block.sweeps for block in samples.stats],
        }


@dataclass(frozen=True)
class Comparison:
    """Samplers at one batch size, from one interleaved run.

    **Attributes:**

    - `batch_size`: samples drawn together.
    - `rows`: a `Row` each: the loop of the flow's original code where it has one, the sequential loop, then `others`.
    - `floor`: a `Timing` of one encoding pass of the batch, each block evaluated once, unguided: what no solver beats.
    """

    batch_size: int
    rows: tuple[Row, ...]
    floor: Timing

    @property
    def original(self) -> str:
        """The name of the original code's loop, see `jacobiflow.baselines.original_loop`."""
        return self.rows[0].strategy

    @property
    def baselines(self) -> tuple[str, ...]:
        """The names of the original code's loop and of the sequential loop; one where they are the same."""
        return tuple(dict.fromkeys((self.original, SEQUENTIAL)))

    @property
    def others(self) -> tuple[Row, ...]:
        """The rows that are no baselines."""
        return self.rows[len(self.baselines) :]

    def row(self, strategy: str) -> Row:
        """The row of that name. **Raises** `KeyError` where there is none."""
        return {row.strategy: row for row in self.rows}[strategy]

    def speed_up(self, row: Row, baseline: str) -> float:
        """How many times `row` is faster than the row that `baseline` names, by medians."""
        return self.row(baseline).seconds.median / row.seconds.median

    def to_json(self) -> dict[str, Any]:
        """A JSON value: rows with their speed-ups, and the floor."""
        return {
            "batch_size": self.batch_size,
            "rows": [
                row.to_json() | {"speed_up": {name: self.speed_up(row, name) for name in self.baselines}}
                for row in self.rows
            ],
            "encoding_pass": asdict(self.floor),
        }


def compare(
    flow: ImageFlow,
    latents: Float[Tensor, "n t c"],
    labels: Int[Tensor, " n"] | None,
    runs: Mapping[str, Callable[[], Samples]],
    *,
    guidance: Guidance | None = None,
    repeats: int = 5,
    after_each: Callable[[str], None] | None = None,
) -> Comparison:
    """Time samplers beside the original code's loop, the sequential loop and an encoding pass, in one interleaved run.

    The sequential loop is not certified: it is exact, and a baseline must not be slowed down.

    **Arguments:**

    - `flow`: the model; its device is used.
    - `latents`: (N, T, C), standard normal, before the prior's scale.
    - `labels`: (N,) classes, or `None`.
    - `runs`: by name, what draws from the same latents, labels and guidance. The names in `timed_anyway` are taken.
    - `guidance`: a `Guidance` for both baselines, or `None`.
    - `repeats`: rounds that count.
    - `after_each`: see `interleave`, whose runs are those in `timed_anyway` and in `runs`.

    **Returns:** a `Comparison`.

    **Raises:** `ValueError` for a name that is taken, `repeats` below 1, latents or labels that do not fit the flow.
    """
    for name in timed_anyway(flow):
        if name in runs:
            raise InputValueError(f"run {name!r}: timed in any case; give it another name, or leave it out")
    original, loop = original_loop(flow)
    sequential = partial(
        sample, flow, labels=labels, latents=latents, strategy="sequential", guidance=guidance, certify=False,
        progress=False,
    )  # fmt: skip
    exact = sequential()
    every: dict[str, Callable[[], Any]] = {
        original: partial(loop, flow, exact.latents, exact.labels, guidance),
        SEQUENTIAL: sequential,  # in place of the original loop where the flow has none of its own
        **runs,
        ENCODING_PASS: partial(_encode, flow, exact.images, exact.labels),
    }
    seconds, results = interleave(every, repeats, flow.var.device, after_each)
    rows = []
    for name in dict.fromkeys((original, SEQUENTIAL, *runs)):
        samples = results[name] if isinstance(results[name], Samples) else None
        images = results[name] if samples is None else samples.images
        rows.append(Row(name, seconds[name], paired_error(images, exact.images), samples))
    return Comparison(len(latents), tuple(rows), seconds[ENCODING_PASS])


def timed_anyway(flow: ImageFlow) -> tuple[str, ...]:
    """The names of what `compare` times beside its `runs`: the baselines, and an encoding pass."""
    return tuple(dict.fromkeys((original_loop(flow)[0], SEQUENTIAL, ENCODING_PASS)))


def _encode(flow: ImageFlow, images: Tensor, labels: Tensor | None) -> None:
    with torch.no_grad():
        flow.encode(images, labels)
