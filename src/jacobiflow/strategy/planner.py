"""Choose, for a device, a batch size and a tolerance, the cheapest way to solve every block."""

from __future__ import annotations

import hashlib
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from jacobiflow.calibration.report import Report
from jacobiflow.calibration.tuning import BlockTuning, Run, Tuning
from jacobiflow.flows.base import AffineBlock, FrontPerSample, LowPrecision
from jacobiflow.flows.fingerprint import fingerprint
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.guidance import Guidance, guided, in_force
from jacobiflow.latents import FIRST_CALIBRATION_LATENT, draw_latents
from jacobiflow.solvers import Chord, MaxSweeps, Sequential, Solver, Tolerance, Whole, Window, solve
from jacobiflow.solvers.solve import LEAVING
from jacobiflow.strategy.notation import DEFAULT_TOLERANCE
from jacobiflow.strategy.strategy import Prediction, Strategy, device_name

_MARGIN = 0.05  # least predicted gain over the sequential loop, beside the timings' own spread
_REPEATS = 3
_LEAST_SECONDS = 0.1  # of repeating what is short, in which the loop's own work is as large as differences are
_TRIALS = 4
_STRICTER = 0.7  # the error that blocks may cause, after a trial whose images were beyond the tolerance
_COUNT_MARGIN = 1.5
_POWER = 4  # see `combined`
_BUSY = 0.3  # a plan by timings that differ by more is not kept
_WINDOW = 32  # of a flow without a tuning
_SETTLED = 1e30  # a tolerance that every sweep meets


class Option(NamedTuple):
    """A way to solve a block: predicted seconds for the batch, and the error of the image that it causes."""

    solver: Solver
    seconds: float
    error: float


@dataclass(frozen=True)
class Costs:
    """Seconds on a device.

    **Attributes:** `sweep[rows, tokens]`, for one sweep of so many samples over so many tokens; `fixed[rows]`, for
    starting a block; `coarse`, for one sweep of the whole batch over all tokens in bfloat16, and `coarse_fixed`, for
    starting these; `sequential`, for a block solved token by token by the whole batch; `spread`, how far repeated
    timings differ, as a share.
    """

    sweep: Mapping[tuple[int, int], float]
    fixed: Mapping[int, float]
    coarse: float
    coarse_fixed: float
    sequential: float
    spread: float

    def of_sweep(self, rows: int, tokens: int) -> float:
        """Seconds of a sweep, linear between the numbers of rows that were timed."""
        timed = sorted(r for r, t in self.sweep if t == tokens)
        if rows <= timed[0]:
            return self.sweep[timed[0], tokens]
        high = next((r for r in timed if r >= rows), timed[-1])
        low = max((r for r in timed if r < high), default=high)
        if high == low:
            return self.sweep[high, tokens]
        share = (min(rows, high) - low) / (high - low)
        return (1 - share) * self.sweep[low, tokens] + share * self.sweep[high, tokens]

    def of_coarse(self, count: int) -> float:
        """Seconds of so many sweeps in bfloat16."""
        return self.coarse_fixed + count * self.coarse if count else 0.0


def plan(
    flow: ImageFlow, report: Report | Tuning, batch_size: int = 1, tolerance: float = 1e-3,
    device: torch.device | str | None = None, guidance: Guidance | None = None,
) -> Strategy:  # fmt: skip
    """The strategy with the least predicted time for a batch whose images are to be within `tolerance`.

    Seconds of a sweep are measured on the device, for the windows of the tuning and a few numbers of rows. A batch of B
    samples, whose sweeps are distributed as the tuning found them, takes the sum of its sweeps' seconds, finished
    samples having left. An image's error is made of the blocks' errors, times amplification; see `combined`.
    Of all combinations of a way per block, token by token included, the cheapest within the tolerance is found exactly.
    Under another guidance than the tuning's, sweeps are taken to be as many, and only what stops on a tolerance is
    chosen.

    The choice is then tried, beside the sequential loop, on a batch that the tuning has not seen. If its images are not
    within the tolerance, the choice is made again for a smaller one; blocks that the loop solves sooner are left to the
    loop. The plan predicts what the trial took. It is the loop throughout unless it gains more than timings vary by.

    **Arguments:** `report` of `jacobiflow.calibrate(..., chord=True)`, or the `Tuning` itself; `device` as a check: the
    flow must be on it.

    **Raises** `ValueError` for another flow's report, one without a tuning, or settings that do not fit.
    """
    tuning = report if isinstance(report, Tuning) else report.tuning
    if tuning is None:
        raise ValueError("this report has no tuning: calibrate with chord=True (--chord)")
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r}: give a positive whole number")
    if not isinstance(tolerance, int | float) or not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance {tolerance!r}: give a positive number; at 0 use strategy 'sequential'")
    if guidance is not None and not isinstance(guidance, Guidance):
        raise ValueError(f"guidance={guidance!r}: give a Guidance, such as Guidance({guidance!r})")
    if device is not None and torch.device(device).type != flow.var.device.type:
        raise ValueError(f"device {device}: the flow is on {flow.var.device}; move it there first")
    tuning.check(flow)
    if len(tuning.blocks) != flow.config.num_blocks:
        raise ValueError(f"tuning of {len(tuning.blocks)} blocks, but the flow has {flow.config.num_blocks}")
    costs = measure(guided(flow.blocks[0], guidance), tuning, batch_size, flow)
    counted = in_force(tuning.guidance) == in_force(guidance)
    options = [block_options(block, costs, batch_size, tolerance, counted) for block in tuning.blocks]
    chosen, loop = _choose(
        options, costs, tolerance, lambda chosen: trial(flow, chosen, _fresh(tuning, flow, batch_size), guidance)
    )
    return Strategy(
        solvers=tuple(option.solver for option in chosen),
        fingerprint=tuning.fingerprint,
        tolerance=float(tolerance),
        prediction=Prediction(
            device=device_name(flow.var.device),
            batch_size=batch_size,
            guidance=guidance,
            seconds=_seconds(chosen),
            sequential_seconds=_seconds(loop),
            error=combined([option.error for option in chosen]),
            spread=costs.spread,
        ),
    )


def _choose(
    options: Sequence[Sequence[Option]], costs: Costs, tolerance: float, attempt: Callable[[Sequence[Option]], Trial]
) -> tuple[list[Option], list[Option]]:
    """An option per block, and the sequential loop's, with the seconds that they took where they were tried."""
    alone = Option(Solver(Sequential()), costs.sequential, 0.0)
    loop = [alone] * len(options)
    enough = 1 - _MARGIN - costs.spread
    budget = tolerance
    for _ in range(_TRIALS):
        chosen = cheapest([[alone, *found] for found in options], budget)
        if _seconds(chosen) > enough * _seconds(loop):
            break
        tried = attempt(chosen)
        if tried.error <= tolerance:
            loop = [alone._replace(seconds=seconds) for seconds in tried.sequential]
            timed = [option._replace(seconds=seconds) for option, seconds in zip(chosen, tried.seconds, strict=True)]
            best = [min(pair, key=lambda option: option.seconds) for pair in zip(timed, loop, strict=True)]
            return (best if _seconds(best) <= enough * _seconds(loop) else loop), loop
        budget *= _STRICTER
    return loop, loop


def _seconds(options: Sequence[Option]) -> float:
    return sum(option.seconds for option in options)


class Trial(NamedTuple):
    """Seconds that each block took as planned and by the sequential loop, and the largest error of an image."""

    seconds: tuple[float, ...]
    sequential: tuple[float, ...]
    error: float


def _fresh(tuning: Tuning, flow: ImageFlow, batch_size: int) -> Tensor:
    """Latents that follow those of the tuning: it has not seen them, and `sample` does not draw them."""
    start = FIRST_CALIBRATION_LATENT + tuning.samples
    return draw_latents(batch_size, flow.config.num_tokens, flow.config.token_channels, tuning.seed, start)


def trial(flow: ImageFlow, chosen: Sequence[Option], latents: Tensor, guidance: Guidance | None) -> Trial:
    """Solve one batch of latents both ways: the options' median of a few runs, and the loop's one run.

    The error is infinite where the options lose a sample in the last block that the loop does not; one that they lost
    before goes on as zeros.
    """
    config = flow.config
    dtype = torch.float64 if flow.var.dtype == torch.float64 else torch.float32
    planned = latents.to(flow.var.device, dtype) * flow.var.sqrt().to(dtype)
    labels = torch.arange(len(latents), device=flow.var.device) % config.num_classes if config.num_classes else None
    exact, seconds, sequential = planned, [], []
    for i in reversed(range(config.num_blocks)):
        block, permutation = guided(flow.blocks[i], guidance), flow.blocks[i].permutation
        z = permutation(planned.nan_to_num(0.0, 0.0, 0.0))
        runs = [solve(block, z, chosen[i].solver, labels) for _ in range(_REPEATS)]
        alone = solve(block, permutation(exact.nan_to_num(0.0, 0.0, 0.0)), Solver(Sequential()), labels)
        seconds.append(statistics.median(run.seconds for run in runs))
        sequential.append(alone.seconds)
        planned, exact = permutation(runs[0].x), permutation(alone.x)
    error = (planned - exact)[torch.isfinite(exact)].abs().nan_to_num(torch.inf)
    return Trial(tuple(seconds[::-1]), tuple(sequential[::-1]), float(error.max()) if len(error) else math.inf)


def block_options(
    block: BlockTuning, costs: Costs, batch_size: int, tolerance: float, counted: bool = True
) -> list[Option]:
    """Every window of a block's tuning at every tolerance, those between two that were tried included, and its counts.

    Counts of sweeps adapt to no sample: their residuals and errors are given a margin, and without `counted` they are
    left out.
    """
    length, fixed = len(block.guess.shift), costs.fixed[batch_size]
    found = []
    for run in _between(block.runs):
        if run.residual <= tolerance:
            solver = Solver(Window(run.window), block.guess, Tolerance(run.tolerance), block.correction, run.coarse)
            seconds = batch_seconds(run.sweeps, batch_size, lambda rows, n=run.window: costs.of_sweep(rows, n))  # type: ignore[misc]
            seconds += fixed + costs.of_coarse(run.coarse)
            found.append(Option(solver, seconds, run.error * block.amplification))
    for count in block.counted if counted else ():
        if _COUNT_MARGIN * count.residual <= tolerance:
            solver = Solver(Whole(), block.guess, MaxSweeps(count.fine), block.correction, count.coarse)
            seconds = fixed + count.fine * costs.of_sweep(batch_size, length) + costs.of_coarse(count.coarse)
            found.append(Option(solver, seconds, _COUNT_MARGIN * count.error * block.amplification))
    return found


def batch_seconds(sweeps: Sequence[int], batch_size: int, seconds: Callable[[int], float]) -> float:
    """Seconds until a batch is done, of samples whose numbers of sweeps are evenly spaced quantiles of `sweeps`.

    `seconds(rows)` is the cost of a sweep. Finished samples leave when they are a quarter of the batch.
    """
    ordered = sorted(sweeps)
    counts = [ordered[min(int((i + 0.5) / batch_size * len(ordered)), len(ordered) - 1)] for i in range(batch_size)]
    if batch_size > 1:
        counts[-1] = ordered[-1]  # the slowest of a batch is what it waits for
    total, rows = 0.0, batch_size
    for k in range(1, counts[-1] + 1):
        total += seconds(rows)
        left = sum(count > k for count in counts)
        if rows - left >= LEAVING * rows:
            rows = left
    return total


def combined(errors: Sequence[float]) -> float:
    """The largest error of an image from those that its blocks cause: the fourth root of the sum of fourth powers.

    Each is the largest over many entries, and they seldom meet in one: squares would say twice what is measured.
    """
    largest = max(errors, default=0.0)
    if not 0 < largest < math.inf:
        return largest
    return largest * math.pow(sum((error / largest) ** _POWER for error in errors), 1 / _POWER)


def cheapest(options: Sequence[Sequence[Option]], tolerance: float) -> list[Option]:
    """One option per block: the least sum of seconds whose `combined` error is within `tolerance`.

    Exact: blocks are added one by one, and of partial choices only those are kept that no other beats in both seconds
    and error.
    """
    kept: list[tuple[float, float, tuple[Option, ...]]] = [(0.0, 0.0, ())]
    for block in options:
        grown = [
            (seconds + option.seconds, errors + option.error**_POWER, (*path, option))
            for seconds, errors, path in kept
            for option in block
            if option.error <= tolerance and errors + option.error**_POWER <= tolerance**_POWER
        ]
        grown.sort(key=lambda choice: choice[:2])
        kept, least = [], math.inf
        for choice in grown:
            if choice[1] < least:
                kept.append(choice)
                least = choice[1]
    if not kept:
        raise ValueError(f"tolerance {tolerance}: no way to solve a block is within it")
    return list(kept[0][2])


def measure(block: AffineBlock, tuning: Tuning, batch_size: int, flow: ImageFlow) -> Costs:
    """Time what plans are made of, on the block's device: a second or two.

    A sweep over n tokens is timed as a solve whose every sweep meets its tolerance, which takes T / n of them: contexts
    of all lengths, and the loop's own work, are in the mean.
    """
    length, channels = tuning.num_tokens, flow.config.token_channels
    tuned = tuning.blocks[0]
    chord = next((b.correction for b in tuning.blocks if isinstance(b.correction, Chord)), tuned.correction)
    dtype = torch.float64 if flow.var.dtype == torch.float64 else torch.float32
    rows = sorted({1, *(-(-batch_size // part) for part in (1, 2, 4, 8))})
    labels = torch.zeros(batch_size, dtype=torch.long, device=flow.var.device) if flow.config.num_classes else None
    z = torch.zeros(batch_size, length, channels, dtype=dtype, device=flow.var.device)
    spreads: list[float] = []

    def timed(solver: Solver, count: int) -> float:
        context = None if labels is None else labels[:count]
        seconds: list[float] = []
        while len(seconds) <= _REPEATS or sum(seconds) < _LEAST_SECONDS:
            started = time.perf_counter()
            solve(block, z[:count], solver, context)
            seconds.append(time.perf_counter() - started)
        spreads.append(statistics.median(seconds[1:]) / min(seconds[1:]) - 1)
        return min(seconds)

    sweep, fixed = {}, {}
    for count in rows:
        one, three = (timed(Solver(Whole(), tuned.guess, MaxSweeps(k), chord), count) for k in (1, 3))
        sweep[count, length] = max((three - one) / 2, 0.0)
        fixed[count] = max(one - sweep[count, length], 0.0)
        for window in sorted({run.window for run in tuned.runs} - {length}):
            solver = Solver(Window(window), tuned.guess, Tolerance(_SETTLED), chord)
            apart = _apart(block, z[:count], None if labels is None else labels[:count], window)
            together = (timed(solver, count) - fixed[count]) / math.ceil(length / window)
            sweep[count, window] = max(together, 0.0) + apart
    coarse, coarse_fixed = math.inf, math.inf
    if isinstance(block, LowPrecision):
        two, four = (timed(Solver(Whole(), tuned.guess, MaxSweeps(1), chord, k), batch_size) for k in (2, 4))
        coarse = max((four - two) / 2, 0.0)
        coarse_fixed = max(two - 2 * coarse - fixed[batch_size] - sweep[batch_size, length], 0.0)
    sequential = timed(Solver(Sequential()), batch_size)
    return Costs(sweep, fixed, coarse, coarse_fixed, sequential, statistics.median(spreads))


def _apart(block: AffineBlock, z: Tensor, labels: Tensor | None, window: int) -> float:
    """What it costs more to sweep a window where samples stand at different tokens."""
    if len(z) == 1 or not isinstance(block, FrontPerSample):
        return 0.0
    start = (z.shape[1] - window) // 2
    starts = torch.full((len(z),), start, device=z.device)
    cache = block.init_cache(z, labels)
    together: list[float] = []
    apart: list[float] = []
    with torch.inference_mode():
        for _ in range(2 * _REPEATS):
            for seconds, call in (
                (together, lambda: block.update(z, z, start, start + window, cache)),
                (apart, lambda: block.update_at(z, z, starts, window, start + window, cache)),
            ):
                began = time.perf_counter()
                call().sum().item()
                seconds.append(time.perf_counter() - began)
    return max(statistics.median(apart) - statistics.median(together), 0.0)


def _between(runs: Sequence[Run]) -> list[Run]:
    """The runs, and between each two of one window at neighbouring tolerances their geometric mean."""
    found = list(runs)
    by_window: dict[tuple[int, int], list[Run]] = {}
    for run in runs:
        by_window.setdefault((run.window, run.coarse), []).append(run)
    for row in by_window.values():
        row.sort(key=lambda run: run.tolerance)
        for tight, loose in pairwise(row):
            found.append(
                Run(
                    tight.window,
                    math.sqrt(tight.tolerance * loose.tolerance),
                    tuple(-(-(a + b) // 2) for a, b in zip(sorted(tight.sweeps), sorted(loose.sweeps), strict=True)),
                    math.sqrt(tight.residual * loose.residual),
                    math.sqrt(tight.error * loose.error),
                    tight.coarse,
                )
            )
    return found


def auto(
    flow: ImageFlow, batch_size: int, tolerance: float | None = None, guidance: Guidance | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Strategy:  # fmt: skip
    """What `strategy="auto"` stands for: the plan for this flow, device, batch size and tolerance (1e-3 by default).

    Plans are made once, from the report.json in the flow's model folder, and kept in the user's cache folder. Without
    a report that has a tuning, all blocks are swept by windows of 32 tokens. `say` is told what takes long, or is
    missing.
    """
    tolerance = DEFAULT_TOLERANCE if tolerance is None else tolerance
    print_ = fingerprint(flow)
    device = device_name(flow.var.device)
    report = _stamp(flow.report_file)
    words = (print_, device, flow.var.dtype, batch_size, tolerance, guidance, report, torch.__version__)
    key = hashlib.sha256(repr(words).encode()).hexdigest()[:32]
    if key not in _plans:
        _plans[key] = _kept(key, print_, flow.config.num_blocks) or _made(
            flow, batch_size, tolerance, guidance, key, say
        )
    return _plans[key]


_plans: dict[str, Strategy] = {}


def _stamp(path: Path | None) -> tuple[Path, int] | None:
    """A file and when it was written: a report that was made anew asks for a new plan."""
    return None if path is None or not path.is_file() else (path, path.stat().st_mtime_ns)


def _kept(key: str, expected: str, num_blocks: int) -> Strategy | None:
    """The plan in the cache folder, unless there is none that can be read."""
    try:
        found = Strategy.load(_folder() / f"{key}.json")
    except ValueError:
        return None
    fits = found.fingerprint == expected and len(found.solvers) == num_blocks and found.prediction is not None
    return found if fits else None


def _made(
    flow: ImageFlow, batch_size: int, tolerance: float, guidance: Guidance | None, key: str, say: Callable[[str], None]
) -> Strategy:
    report = None if flow.report_file is None or tolerance == 0 else Report.load(flow.report_file)
    if report is None or report.tuning is None:
        say("auto: windows of 32 tokens; a plan needs a tolerance above 0, and a report.json in the model's folder by "
            "jacobiflow calibrate --chord")  # fmt: skip
        return Strategy.uniform(Solver(Window(_WINDOW), stopping=Tolerance(tolerance)), flow.config.num_blocks)
    say(f"auto: planning for batches of {batch_size} on {device_name(flow.var.device)}, once")
    made = plan(flow, report, batch_size, tolerance, guidance=guidance)
    if made.prediction is not None and made.prediction.spread > _BUSY:
        say(f"auto: timings differ by {made.prediction.spread:.0%}, the machine is busy; planning anew next time")
        return made
    with suppress(OSError):  # a plan that cannot be kept is made again next time
        _folder().mkdir(parents=True, exist_ok=True)
        made.save(_folder() / f"{key}.json")
    return made


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jacobiflow" / "plans"
