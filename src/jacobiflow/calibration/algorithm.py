"""Preprocessing of the paper's Algorithm 1: a strategy from the metrics of a report."""

from __future__ import annotations

from jacobiflow.calibration.report import Report
from jacobiflow.checks import check_flag, check_kind, check_number


def gs_jacobi_notation(
    report: Report, tolerance: float = 1e-2, *, per_segment: bool = False, call_cost: float = 32.0
) -> str:
    """Proposes a strategy by Algorithm 1 of the paper: tough blocks by CRM, numbers of sweeps as measured.

    A tough block is cut into G segments of J sweeps. J is the number that the slowest sample traced needed in its
    slowest segment to come within `tolerance` of the solution, the segments before it being solved. Of the G measured
    with J <= T // G, and of G = T with J = 1, which is the exact loop, the algorithm takes the one with the least
    J (T + G call_cost): tokens swept, and calls. The other blocks are swept whole, as often as the slowest of them
    needed.

    Args:
        report: Of the flow.
        tolerance: One that was measured: 1e-1, 1e-2, 1e-3, 1e-4.
        per_segment: Whether each segment gets the J that it needed itself.
        call_cost: Fixed cost of a network call, in tokens: about 32 for a batch of 1 on a CPU, more on a GPU, less for
            a larger batch.

    Returns:
        The strategy in the paper's notation, [Stack-GS-J-Else]; or Jacobi-J if no block is tough.

    Raises:
        ValueError: If CRM is not defined or the tolerance was not measured.

    Example:
        >>> report = jf.Report.load(jf.find_report(jf.load("fashion-p2")))
        >>> gs_jacobi_notation(report)
        '[7-196-1-10]'
    """
    check_kind("report", report, Report, "a Report, as calibrate returns")
    tolerance, call_cost = check_number("tolerance", tolerance), check_number("call_cost", call_cost)
    check_flag("per_segment", per_segment)
    tough = report.tough_blocks
    needed = report.slowest_sweeps("noise", tolerance)
    others = max(1, *(count for block, count in enumerate(needed) if block not in tough))
    if not tough:
        return f"Jacobi-{others}"
    ways = [_cheapest_segments(report, block, tolerance, per_segment, call_cost) for block in tough]
    stack, segments, sweeps = ("/".join(map(str, column)) for column in (tough, *zip(*ways, strict=True)))
    return f"[{stack}-{segments}-{sweeps}-{others}]"


def _cheapest_segments(
    report: Report, block: int, tolerance: float, per_segment: bool, call_cost: float
) -> tuple[int, str]:
    """GS and J of a tough block."""
    length = report.num_tokens
    best, least_cost = (length, "1"), length * (1 + call_cost)
    for count, traces in report.segment_traces[block].items():
        sweeps = [max(1, *trace.reach(tolerance, length)) for trace in traces]
        total = sum(sweeps) if per_segment else count * max(sweeps)
        cost = total * (length / count + call_cost)
        if max(sweeps) <= length // count and cost < least_cost:
            best = count, ",".join(map(str, sweeps)) if per_segment else str(max(sweeps))
            least_cost = cost
    return best
