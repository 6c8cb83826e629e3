"""A strategy: one solver per block, as data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from jacobiflow import codec
from jacobiflow.calibration.convergence import Trace
from jacobiflow.calibration.report import Report
from jacobiflow.checks import (
    check_count,
    check_fields,
    check_flag,
    check_kind,
    check_number,
    check_path,
    short,
)
from jacobiflow.errors import InputError, InputValueError
from jacobiflow.files import write_json
from jacobiflow.flows.config import MOST_BLOCKS, MOST_TOKENS
from jacobiflow.flows.fingerprint import cached_fingerprint, check_fingerprint
from jacobiflow.flows.image_flow import ImageFlow, check_flow
from jacobiflow.guidance import Guidance, check_guidance, in_force
from jacobiflow.solvers import EarlyStop, Latent, MaxSweeps, Segments, Solver, Whole
from jacobiflow.strategy import notation
from jacobiflow.strategy.notation import DEFAULT_TOLERANCE

FORMAT_VERSION = 1
_ENTRIES = ("partition", "guess", "correction", "stopping", "coarse")  # of a block, in the order of the files


@dataclass(frozen=True)
class Prediction:
    """What a planned strategy is for, and what it should cost.

    **Attributes:** `device`, its name, and a CPU's threads; `batch_size`; `guidance`; `seconds` for a batch, as it was
    tried, certificates included, and `sequential_seconds` by the sequential loop; `error`, the largest of an image
    against the exact inverse; `spread`, by how much the timings differed, as a share.
    """

    device: str
    batch_size: int
    guidance: Guidance | None
    seconds: float
    sequential_seconds: float
    error: float
    spread: float

    def __post_init__(self) -> None:
        check_fields(self)
        check_count("batch_size", self.batch_size)
        for name in ("seconds", "sequential_seconds", "error", "spread"):
            if not getattr(self, name) >= 0:
                raise InputValueError(f"prediction: {name}={getattr(self, name)}: give 0 or a positive number")


@dataclass(frozen=True)
class Strategy:
    """One `Solver` per block, in encoding order: entry 0 is for the block that touches the image.

    `fingerprint` is that of the flow whose report it was made with, `None` where it is for any flow; see `check`.
    `tolerance` is what samples are certified to, `None` for each solver's own; `prediction` is there where
    `jacobiflow.plan` made it. Strategies are equal when their solvers and their tolerance are.

    **Raises** `TypeError` for other kinds of values, `ValueError` where there is no solver, or there are too many.
    """

    solvers: tuple[Solver, ...]
    fingerprint: str | None = field(default=None, compare=False)
    tolerance: float | None = None
    prediction: Prediction | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < len(self.solvers) <= MOST_BLOCKS:
            raise InputValueError(
                f"solvers: {len(self.solvers)} of them; give one for each block, at most {MOST_BLOCKS:,}"
            )
        if self.tolerance is not None:
            check_number("tolerance", self.tolerance)

    @classmethod
    def uniform(cls, solver: Solver, num_blocks: int) -> Strategy:
        """The same solver for every block. **Raises** as `Strategy` does."""
        check_kind("solver", solver, Solver, "a Solver, such as Solver(Whole())")
        return cls((solver,) * check_count("num_blocks", num_blocks, most=MOST_BLOCKS))

    @classmethod
    def parse(
        cls, text: str, report: Report | None = None, *, num_blocks: int | None = None, num_tokens: int | None = None,
        tolerance: float = DEFAULT_TOLERANCE,
    ) -> Strategy:  # fmt: skip
        """The strategy that `text` names.

        The paper's notation [Stack-GS-J-Else] (section 3.4): blocks in Stack are cut into GS segments of J sweeps each,
        the others are swept Else times; several stacked blocks, and several GS and J, have slashes between them,
        "[0/7-256/8-1/13-6]"; a J with commas has a number for each segment, "[7-4-25,13,12,11-10]". "Jacobi-30" sweeps
        all tokens of every block 30 times. The notation leaves the guesses to IGM. "sequential" solves token by token;
        "Original", a row of the paper's tables, is read as "sequential".

        To `tolerance`: "jacobi", "gs-jacobi:8" (8 segments), "window:24", and any partition that is registered, its
        name followed by its numbers. "gs-jacobi:8-32": 32 sweeps a segment. Registered guesses and corrections are
        added by their names: "jacobi+zeros". Where sweeps are counted, the paper's early stop is on
        (`jacobiflow.EarlyStop`).

        **Arguments:** `report` gives each block the guess with the smallest IGM, and the sizes of the flow. Without it
        every guess is `Latent`, and `num_blocks` and `num_tokens` must be given.

        **Raises** `ValueError` that quotes the part at fault, `TypeError` for other kinds of arguments.
        """
        check_kind("text", text, str, "the name of a strategy")
        check_kind("report", report, Report | None, "a Report, as calibrate returns, or None")
        tolerance = check_number("tolerance", tolerance)
        blocks = _size(text, "num_blocks", num_blocks, report.num_blocks if report else None, MOST_BLOCKS)
        tokens = _size(text, "num_tokens", num_tokens, report.num_tokens if report else None, MOST_TOKENS)
        guesses = [report.guess(block) if report else Latent() for block in range(blocks)]
        return cls(notation.parse(text, guesses, tokens, tolerance), report.fingerprint if report else None)

    @classmethod
    def from_report(
        cls, report: Report, tolerance: float = 1e-2, *, per_segment: bool = False, call_cost: float = 32.0
    ) -> Strategy:
        """The strategy that the paper's Algorithm 1 proposes: tough blocks by CRM, guesses by IGM, counts as measured.

        A tough block is cut into G segments of J sweeps. J is what the slowest sample traced needed in its slowest
        segment to come within `tolerance` of the solution, the segments before it being solved. Of the G measured with
        J <= T // G, and of G = T with J = 1, which is the sequential loop, it takes the one with the least
        J (T + G call_cost): tokens swept, and calls. The other blocks are swept whole, as often as the slowest of them
        needed.

        **Arguments:** `tolerance` is one that was measured: 1e-1, 1e-2, 1e-3, 1e-4. `per_segment` gives each segment
        the J that it needed itself. `call_cost` is the fixed cost of a network call, in tokens: about 32 for a batch of
        1 on a CPU, more on a GPU, less for a larger batch.

        **Raises** `ValueError` where CRM is not defined or the tolerance was not measured, `TypeError` for other kinds.
        """
        check_kind("report", report, Report, "a Report, as calibrate returns")
        tolerance, call_cost = check_number("tolerance", tolerance), check_number("call_cost", call_cost)
        check_flag("per_segment", per_segment)
        length, tough = report.num_tokens, report.tough_blocks
        needed = report.slowest_sweeps("noise", tolerance)
        easy = max((count for block, count in enumerate(needed) if block not in tough), default=1)
        solvers = [Solver(Whole(), stopping=MaxSweeps(max(easy, 1)) | EarlyStop())] * report.num_blocks
        for block in tough:
            cost = length * (1 + call_cost)
            solvers[block] = Solver(Segments(length), stopping=MaxSweeps(1) | EarlyStop())
            whole = report.traces["noise"][block][report.best_guess(block)]
            # A report by an older rule may call fewer blocks tough, and have their sweeps of all tokens only.
            for count, traces in report.segment_traces.get(block, {1: (whole,)}).items():
                each = tuple(_sweeps(trace, tolerance, length) for trace in traces)
                total = sum(each) if per_segment else count * max(each)
                if max(each) <= length // count and total * (length / count + call_cost) < cost:
                    cost = total * (length / count + call_cost)
                    sweeps = MaxSweeps(each if per_segment and count > 1 else max(each))
                    solvers[block] = Solver(Segments(count), stopping=sweeps | EarlyStop())
        return cls(tuple(replace(s, guess=report.guess(i)) for i, s in enumerate(solvers)), report.fingerprint)

    def __str__(self) -> str:
        """A text that `parse`, given the report of the guesses, turns back into this strategy; else its solvers."""
        return notation.show(self.solvers) or "\n".join(f"block {i}: {s}" for i, s in enumerate(self.solvers))

    @property
    def has_tolerance(self) -> bool:
        """Whether a block stops on a tolerance, or samples are certified to one."""
        return self.tolerance is not None or any(s.stopping.atol is not None for s in self.solvers)

    def residual_bound(self, num_tokens: int) -> float | None:
        """The residual that every block of `num_tokens` tokens is held to; `None` if one has a number of sweeps only.

        A block that is solved token by token is exact, and needs no tolerance.
        """
        if self.tolerance is not None:
            return self.tolerance
        iterated = [s.stopping.atol for s in self.solvers if not s.partition.token_by_token(num_tokens)]
        return None if None in iterated else max((atol for atol in iterated if atol is not None), default=0.0)

    def with_tolerance(self, atol: float) -> Strategy:
        """This strategy with `atol` in place of every tolerance that it has; sweep counts stay.

        **Raises** `ValueError` where that is none, or the strategy was planned for another.
        """
        atol = check_number("tolerance", atol)
        if self.tolerance is not None and atol != self.tolerance:
            raise InputValueError(f"tolerance={atol}: the strategy was planned for {self.tolerance:g}; plan again")
        if self.tolerance is not None:
            return self
        solvers = (
            s if s.stopping.atol is None else replace(s, stopping=replace(s.stopping, atol=atol)) for s in self.solvers
        )
        return replace(self, solvers=tuple(solvers))

    def check(self, flow: ImageFlow) -> None:
        """**Raises** `ValueError` where the strategy was made with the report of another flow, or does not fit its
        blocks and tokens.
        """
        check_flow(flow)
        config = flow.config
        if len(self.solvers) != config.num_blocks:
            raise InputValueError(f"strategy for {len(self.solvers)} blocks, but the flow has {config.num_blocks}")
        for i, solver in enumerate(self.solvers):
            try:
                solver.check(config.num_tokens, config.token_channels)
            except InputError as error:
                raise InputValueError(f"strategy, block {i}: {error}") from error
        if self.fingerprint not in (None, cached_fingerprint(flow)):
            check_fingerprint(self.fingerprint, flow, "the strategy was made for")

    def check_use(self, device: torch.device, batch_size: int, guidance: Guidance | None) -> None:
        """**Raises** `ValueError` where the strategy was planned for another device, other guidance or fewer samples.

        A smaller batch is solved as well, if not as fast as one that was planned for.
        """
        check_kind("device", device, torch.device, "a torch.device")
        batch_size = check_count("batch_size", batch_size)
        check_guidance(guidance)
        if self.prediction is None:
            return
        for name, planned, have in (
            ("device", self.prediction.device, device_name(device)),
            ("guidance", in_force(self.prediction.guidance), in_force(guidance)),
        ):
            if planned != have:
                raise InputValueError(f"the strategy was planned for {name} {planned}, not {have}: plan again")
        if batch_size > self.prediction.batch_size:
            raise InputValueError(
                f"the strategy was planned for batches of up to {self.prediction.batch_size}, not {batch_size}: plan "
                "again, or give a smaller batch_size"
            )

    def to_json(self) -> dict[str, Any]:
        """A JSON value that `from_json` turns back into an equal strategy."""
        return {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "tolerance": self.tolerance,
            "prediction": codec.encode(self.prediction),
            "blocks": [{name: codec.encode(getattr(s, name)) for name in _ENTRIES} for s in self.solvers],
        }

    @classmethod
    def from_json(cls, value: Any) -> Strategy:
        """Inverse of `to_json`. **Raises** `ValueError` that names the block and the entry at fault."""
        if not isinstance(value, dict) or value.get("format_version") != FORMAT_VERSION:
            raise InputValueError(f"strategy: not a JSON object with format_version {FORMAT_VERSION}")
        blocks = value.get("blocks")
        if not isinstance(blocks, list) or not blocks:
            raise InputValueError("strategy: 'blocks' must list one solver per block")
        if len(blocks) > MOST_BLOCKS:
            raise InputValueError(f"strategy for {len(blocks)} blocks: the limit is {MOST_BLOCKS:,}")
        return cls(
            solvers=tuple(_solver(block, f"block {i}") for i, block in enumerate(blocks)),
            fingerprint=codec.decode(str | None, value.get("fingerprint"), "fingerprint"),
            tolerance=codec.decode(float | None, value.get("tolerance"), "tolerance"),
            prediction=codec.decode(Prediction | None, value.get("prediction"), "prediction"),
        )

    def save(self, path: str | Path) -> None:
        """Write as JSON; the file appears whole or not at all."""
        check_path("path", path)
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Strategy:
        """Read what `save` wrote. **Raises** `ValueError` where the file is missing or not a strategy."""
        return codec.load(path, "strategy", cls.from_json)


def device_name(device: torch.device) -> str:
    """What timings depend on: the device's name, and for a CPU the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} with {torch.get_num_threads()} threads"


def _solver(block: Any, where: str) -> Solver:
    """The solver of a block; only `coarse`, which older files lack, may be missing."""
    missing = [name for name in _ENTRIES if name != "coarse" and isinstance(block, dict) and name not in block]
    if missing:
        raise InputValueError(f"{where}: {', '.join(missing)} missing")
    return codec.decode(Solver, block, where)


def _size(text: str, name: str, given: int | None, reported: int | None, most: int) -> int:
    size = reported if given is None else given
    if size is None:
        raise InputValueError(f"strategy {short(text)}: give a report, or {name} of the flow")
    size = check_count(name, size, most=most)
    if reported is not None and size != reported:
        raise InputValueError(f"strategy {short(text)}: {name}={size}, but the report is of a flow with {reported}")
    return size


def _sweeps(trace: Trace, tolerance: float, most: int) -> int:
    """Sweeps of the slowest sample, between 1 and `most`."""
    count = trace.slowest(tolerance)
    return most if count is None else max(1, min(count, most))
