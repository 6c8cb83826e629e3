"""A strategy: one solver per block, as data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from jacobiflow.blocks.guidance import Guidance
from jacobiflow.calibration import CalibrationReport, gs_jacobi_notation
from jacobiflow.errors import InputError, InputValueError
from jacobiflow.fixed_point import Guess, Latent, Solver, Stopping
from jacobiflow.fixed_point.options import DEFAULT_TOLERANCE
from jacobiflow.fixed_point.registry import decode_piece
from jacobiflow.models.checkpoints.fingerprint import cached_fingerprint, check_fingerprint
from jacobiflow.models.flow import Flow, check_flow
from jacobiflow.planner import notation
from jacobiflow.utils.checks import check_count, check_fields, check_kind, check_number, format_value
from jacobiflow.utils.deprecation import retired
from jacobiflow.utils.serialization import JsonDocument, decode

_MAX_BLOCKS = 1_000


@dataclass(frozen=True)
class Prediction:
    """The conditions of a plan, and the time that it should take.

    Attributes:
        device: The name of the device, and a CPU's threads.
        batch_size: Samples that are solved together.
        guidance: The guidance to sample with.
        seconds: Measured seconds for a batch, certificates included.
        sequential_seconds: Seconds for a batch by the exact loop.
        error: The largest difference between an image and that of the exact inverse.
    """

    device: str
    batch_size: int
    guidance: Guidance | None
    seconds: float
    sequential_seconds: float
    error: float


@dataclass(frozen=True)
class Strategy(JsonDocument):
    """One `Solver` per block, in encoding order. Strategies are equal if their solvers and their tolerance are.

    Attributes:
        solvers: Entry 0 is for the block that touches the image.
        fingerprint: Fingerprint of the only flow that the strategy is for; `None` for any flow. See `check`.
        tolerance: The largest residual of a certified sample in any block. With `None` only the solvers' stopping rules
            end the sweeps, and nothing is promised.
        prediction: The time and the error that `jacobiflow.plan` expects.

    Example:
        >>> strategy = jf.Strategy.uniform(jf.Solver(jf.Window(16)), num_blocks=4)
        >>> jf.sample(jf.load("digits-p1"), 2, strategy=strategy).images.shape
        torch.Size([2, 1, 8, 8])
    """

    _name, _version, _remedy = "strategy", 3, "; make it anew with jacobiflow plan"
    _hook = staticmethod(decode_piece)

    solvers: tuple[Solver, ...]
    fingerprint: str | None = field(default=None, compare=False)
    tolerance: float | None = DEFAULT_TOLERANCE
    prediction: Prediction | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < len(self.solvers) <= _MAX_BLOCKS:
            raise InputValueError(f"solvers: {len(self.solvers)} of them; give one per block, at most {_MAX_BLOCKS:,}")
        if self.tolerance is not None:
            check_number("tolerance", self.tolerance)

    @classmethod
    def from_json(cls, value: Any) -> Strategy:
        """Inverse of `to_json`; also reads format 2, in which a solver had a correction."""
        return super().from_json(_without_corrections(value))

    @classmethod
    def uniform(cls, solver: Solver, num_blocks: int, tolerance: float | None = DEFAULT_TOLERANCE) -> Strategy:
        """Returns the strategy that solves every block by the same solver."""
        return cls((solver,) * check_count("num_blocks", num_blocks, maximum=_MAX_BLOCKS), tolerance=tolerance)

    @classmethod
    def parse(cls, text: str, report: CalibrationReport | None = None, *, num_blocks: int | None = None) -> Strategy:
        """Reads a strategy from its name. Its tolerance is 1e-3, or `None` if the name has numbers of sweeps.

        - "sequential" solves token by token; "Original", a row of the paper's tables, is the same.
        - To the tolerance: "jacobi", "gs-jacobi:8" (8 segments), "window:24", and any registered partition, its name
          followed by its numbers.
        - A number of sweeps, with the early stop of the paper's Algorithm 1: "jacobi-30", "gs-jacobi:8-32".
        - The paper's [Stack-GS-J-Else] (section 3.4): blocks in Stack are cut into GS segments of J sweeps each, the
          others are swept Else times. Several in Stack, GS and J have slashes between them, "[0/7-256/8-1/13-6]"; a J
          with commas has a number for each segment, "[7-4-25,13,12,11-10]".
        - A registered guess is added by its name: "jacobi+zeros".

        Args:
            text: The name.
            report: Gives each block the guess with the smallest IGM. Without it every guess is `Latent`.
            num_blocks: L; needed without a report.

        Example:
            >>> strategy = jf.Strategy.parse("[1-4-9-6]", num_blocks=2)
            >>> strategy.solvers[1].partition
            Segments(count=4)
        """
        check_kind("text", text, str, "the name of a strategy")
        check_kind("report", report, CalibrationReport | None, "a CalibrationReport, as calibrate returns, or None")
        fingerprint = None if report is None else report.fingerprint
        if report is not None:
            guesses: list[Guess] = [report.guess(block) for block in range(report.num_blocks)]
        elif num_blocks is not None:
            guesses = [Latent()] * check_count("num_blocks", num_blocks, maximum=_MAX_BLOCKS)
        else:
            raise InputValueError(f"strategy {format_value(text)}: give a report, or num_blocks of the flow")
        solvers = notation.parse(text, guesses)
        has_rules = any(solver.stopping != Stopping() for solver in solvers)
        return cls(solvers, fingerprint, None if has_rules else DEFAULT_TOLERANCE)

    @classmethod
    def from_report(
        cls, report: CalibrationReport, tolerance: float = 1e-2, *, per_segment: bool = False, call_cost: float = 32.0
    ) -> Strategy:
        """Proposes a strategy by the paper's Algorithm 1; see `jacobiflow.calibration.gs_jacobi_notation`.

        Example:
            >>> report = jf.CalibrationReport.load(jf.find_report(jf.load("fashion-p2")))
            >>> jf.Strategy.from_report(report) == jf.Strategy.parse("[7-196-1-10]", report)
            True
        """
        notation = gs_jacobi_notation(report, tolerance, per_segment=per_segment, call_cost=call_cost)
        return cls.parse(notation, report)

    def __str__(self) -> str:
        """Lists the solvers, a line for each block."""
        return "\n".join(f"block {i}: {solver}" for i, solver in enumerate(self.solvers))

    def with_tolerance(self, tolerance: float) -> Strategy:
        """Returns the strategy with another tolerance; the solvers keep their stopping rules.

        Raises:
            ValueError: If the strategy was planned for another tolerance.
        """
        tolerance = check_number("tolerance", tolerance)
        if self.prediction is not None and tolerance != self.tolerance:
            message = f"the strategy was planned for {self.tolerance:g}; plan again"
            raise InputValueError(message, argument="tolerance", value=tolerance)
        return replace(self, tolerance=tolerance)

    def check(self, flow: Flow, batch_size: int = 1) -> None:
        """Checks that the strategy fits the flow, and was planned for its conditions.

        A batch may be smaller than the one that was planned for; it then takes longer than it could.

        Raises:
            ValueError: If the strategy is for another flow, another device, other guidance or fewer samples.
        """
        check_flow(flow)
        config = flow.config
        if len(self.solvers) != config.num_blocks:
            raise InputValueError(f"strategy for {len(self.solvers)} blocks, but the flow has {config.num_blocks}")
        for i, solver in enumerate(self.solvers):
            try:
                solver.check(config.num_tokens, self.tolerance)
            except InputError as error:
                raise InputValueError(f"strategy, block {i}: {error}") from error
        if self.fingerprint is not None and self.fingerprint != cached_fingerprint(flow):
            check_fingerprint(self.fingerprint, flow, "the strategy was made for")
        if self.prediction is None:
            return
        for name, planned, actual in (
            ("device", self.prediction.device, device_name(flow.var.device)),
            ("guidance", self.prediction.guidance, flow.guidance),
        ):
            if planned != actual:
                raise InputValueError(f"the strategy was planned for {name} {planned}, not {actual}: plan again")
        if batch_size > self.prediction.batch_size:
            raise InputValueError(
                f"the strategy was planned for batches of up to {self.prediction.batch_size}, not {batch_size}: plan "
                "again, or give a smaller batch size"
            )


def _without_corrections(value: Any) -> Any:
    """Returns a file of format 2 in format 3. The correction "plain" did nothing; the others are retired."""
    if not isinstance(value, dict) or value.get("format_version") != 2:
        return value
    solvers = decode(list[dict[str, Any]], value.get("solvers"), "solvers")
    for solver in solvers:
        kind = decode(dict[str, Any], solver.pop("correction", {}), "correction").get("kind", "plain")
        if kind != "plain":
            raise InputValueError(retired(f"the correction {format_value(kind)} of a solver"))
    return {**value, "format_version": 3, "solvers": solvers}


def device_name(device: torch.device) -> str:
    """Returns the name of a device, and for a CPU the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    num = torch.get_num_threads()
    return f"{device.type} with {num} thread{'s' * (num > 1)}"
