"""Timings that can be compared: every sampler in turn on the same latents, beside two baselines and a floor."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.flows.maf import MAF
from jacobiflow.flows.tarflow import TarFlow
from jacobiflow.full_passes import full_passes_sample
from jacobiflow.growing_cache import growing_cache_sample
from jacobiflow.guidance import Guidance
from jacobiflow.sampling import Samples, sample

GROWING_CACHE, FULL_PASSES = "growing cache", "full passes"
SEQUENTIAL = "sequential"
ENCODING_PASS = "encoding pass"


@dataclass(frozen=True)
class Timing:
    """Seconds of one run: `median`, `min` and `max` over the rounds that count."""

    median: float
    min: float
    max: float


@dataclass(frozen=True)
class Error:
    """Largest, mean and root-mean-square difference between entries of two answers; see `paired_error`."""

    max: float
    mean: float
    rms: float


@dataclass(frozen=True)
class Row:
    """One sampler at one batch size.

    **Attributes:**

    - `strategy`: its name.
    - `seconds`: a `Timing` of the whole batch.
    - `error`: an `Error` against the sequential answer.
    - `samples`: the `Samples` of its warm-up; `None` for the original loop, which counts and certifies nothing.
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
            "resolved_sequentially": None if samples is None else samples.resolved_sequentially,
            "sweeps": None if samples is None else [block.sweeps for block in samples.stats],
        }


@dataclass(frozen=True)
class Comparison:
    """Samplers at one batch size, from one interleaved run.

    **Attributes:**

    - `batch_size`: samples drawn together.
    - `rows`: a `Row` each: the loop of the flow's original code, the sequential loop, then those that were given.
    - `floor`: a `Timing` of one encoding pass of the batch, each block evaluated once, unguided: what no solver beats.
    """

    batch_size: int
    rows: tuple[Row, ...]
    floor: Timing

    @property
    def original(self) -> str:
        """The name of the original code's loop; see `original_loop`."""
        return self.rows[0].strategy

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
                row.to_json() | {"speed_up": {name: self.speed_up(row, name) for name in (self.original, SEQUENTIAL)}}
                for row in self.rows
            ],
            "encoding_pass": asdict(self.floor),
        }


def interleave(
    runs: Mapping[str, Callable[[], Any]],
    repeats: int,
    device: torch.device | str = "cpu",
    after_each: Callable[[str], None] | None = None,
) -> tuple[dict[str, Timing], dict[str, Any]]:
    """Time callables in turn: a warm-up round, which does not count, then `repeats` rounds over all of them.

    Taking turns lets what slows the machine down for a while slow all of them. Work queued on `device` is waited for
    before the clock is read.

    **Arguments:** `runs` by name, in their order; `after_each` is called with the name after each of the
    `(repeats + 1) * len(runs)` runs, while no clock runs.

    **Returns:** a `Timing` by name, and what each run returned in the warm-up.

    **Raises:** `ValueError` where `repeats` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: give a positive number of rounds")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    results: dict[str, Any] = {}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            _synchronize(device)
            started = perf_counter()
            result = run()
            _synchronize(device)
            elapsed = perf_counter() - started
            if repeat:
                seconds[name].append(elapsed)
            else:
                results[name] = result
            del result  # or a second answer would be in memory beside the next run
            if after_each is not None:
                after_each(name)
    return {name: Timing(statistics.median(s), min(s), max(s)) for name, s in seconds.items()}, results


def paired_error(actual: Float[Tensor, "n c h w"], exact: Float[Tensor, "n c h w"]) -> Error:
    """Differences between images of the same latents, entry by entry, in the images' units.

    An entry that is NaN in one of them only counts as infinite. One that is NaN in both counts as 0: the exact inverse
    overflows there, and both say so.
    """
    lost = actual.isnan() & exact.isnan()
    difference = (actual.double() - exact.double()).abs().masked_fill(lost, 0).nan_to_num(torch.inf, torch.inf)
    return Error(float(difference.max()), float(difference.mean()), float(difference.square().mean().sqrt()))


def original_loop(flow: ImageFlow) -> tuple[str, Callable[..., Tensor]]:
    """The loop by which the flow's original code samples, and its name: "growing cache", or "full passes" for a MAF.

    It is called with the flow, latents, labels and guidance, and gives images. **Raises** `ValueError` for a flow of
    another kind, which has none here.
    """
    if isinstance(flow, TarFlow):
        return GROWING_CACHE, growing_cache_sample
    if isinstance(flow, MAF):
        return FULL_PASSES, full_passes_sample
    raise ValueError(f"{type(flow).__name__}: has no original loop to compare with; give a TarFlow or a MAF")


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
    - `runs`: by name, what draws from the same latents, labels and guidance. None may be called "sequential",
        "encoding pass", or as `original_loop` is.
    - `guidance`: a `Guidance` for both baselines, or `None`.
    - `repeats`: rounds that count.
    - `after_each`: see `interleave`, whose runs are `len(runs) + 3`.

    **Returns:** a `Comparison`.

    **Raises:** `ValueError` for a name that is taken, `repeats` below 1, latents or labels that do not fit the flow.
    """
    original, loop = original_loop(flow)
    for name in (original, SEQUENTIAL, ENCODING_PASS):
        if name in runs:
            raise ValueError(f"run {name!r}: timed in any case; give it another name, or leave it out")
    sequential = partial(
        sample, flow, labels=labels, latents=latents, strategy="sequential", guidance=guidance, certify=False,
        progress=False,
    )  # fmt: skip
    exact = sequential()
    every: dict[str, Callable[[], Any]] = {
        original: partial(loop, flow, exact.latents, exact.labels, guidance),
        SEQUENTIAL: sequential,
        **runs,
        ENCODING_PASS: partial(_encode, flow, exact.images, exact.labels),
    }
    seconds, results = interleave(every, repeats, flow.var.device, after_each)
    rows = []
    for name in (original, SEQUENTIAL, *runs):
        samples = results[name] if isinstance(results[name], Samples) else None
        images = results[name] if samples is None else samples.images
        rows.append(Row(name, seconds[name], paired_error(images, exact.images), samples))
    return Comparison(len(latents), tuple(rows), seconds[ENCODING_PASS])


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a timing depends on: processor, its cores, PyTorch's threads, the device's name, and versions."""
    device = torch.device(device)
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "jacobiflow": version("jacobiflow"),
    }


def _processor() -> str:
    """The processor's model name, and its bfloat16 units, which the name hides in a virtual machine."""
    name, path = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name} with AVX512-BF16 and AMX" if any("amx_bf16" in line for line in lines) else name


def _encode(flow: ImageFlow, images: Tensor, labels: Tensor | None) -> None:
    with torch.no_grad():
        flow.encode(images, labels)


def _synchronize(device: torch.device | str) -> None:
    """Wait for the work queued on a device that works on its own."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()
