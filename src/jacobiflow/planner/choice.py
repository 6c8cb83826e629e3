"""The strategy that a name, a file or a `Strategy` stands for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jacobiflow.errors import InputValueError
from jacobiflow.fixed_point.options import DEFAULT_TOLERANCE
from jacobiflow.models.flow import Flow
from jacobiflow.planner.notation import is_auto
from jacobiflow.planner.strategy import Strategy
from jacobiflow.utils.checks import check_kind, check_number, format_value


@dataclass(frozen=True)
class Auto:
    """The strategy "auto", which `jacobiflow.planner.auto` plans when samples are drawn.

    Attributes:
        tolerance: The largest residual of a sample.
    """

    tolerance: float = DEFAULT_TOLERANCE

    @classmethod
    def parse(cls, name: str, tolerance: float | None = None) -> Auto:
        """Reads "auto", whose tolerance is `tolerance`, or "auto:TOLERANCE".

        Raises:
            ValueError: If the tolerance is not a number from 0, or if it is given twice.
        """
        _, colon, text = name.partition(":")
        if not colon:
            return cls() if tolerance is None else cls(check_number("tolerance", tolerance))
        try:
            value = float(text)
        except ValueError as error:
            raise InputValueError(
                f"strategy {format_value(name)}: give auto, or auto:TOLERANCE such as auto:1e-2"
            ) from error
        if tolerance not in (None, value):
            raise InputValueError(f"strategy {name!r} with tolerance {tolerance!r}: give the tolerance once")
        return cls(check_number("tolerance", value))


def resolve_strategy(
    strategy: str | Path | Strategy, flow: Flow, batch_size: int, tolerance: float | None = None
) -> Strategy | Auto:
    """Returns the strategy for batches of a size.

    Args:
        strategy: "auto", planned for this flow, device and batch size, or "auto:1e-2", to that tolerance; another name
            (see `Strategy.parse`); the path of a JSON file; or a `Strategy`.
        tolerance: Replaces the tolerance of the strategy.

    Raises:
        ValueError: If the strategy does not fit the flow, or was planned for another tolerance.
    """
    check_kind("strategy", strategy, str | Path | Strategy, "a name, a Strategy, or the path of one's file")
    if isinstance(strategy, str) and is_auto(strategy):
        return Auto.parse(strategy, tolerance)
    if isinstance(strategy, Strategy):
        plan = strategy
    elif str(strategy).endswith(".json"):
        plan = Strategy.load(strategy)
    else:
        plan = Strategy.parse(str(strategy), num_blocks=flow.config.num_blocks)
    if tolerance is not None:
        plan = plan.with_tolerance(tolerance)
    plan.check(flow, batch_size)
    return plan
