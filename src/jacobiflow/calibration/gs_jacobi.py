"""The strategy that Algorithm 1 of the paper derives from a calibration report."""

from __future__ import annotations

from jacobiflow.calibration.report import CalibrationReport
from jacobiflow.utils.checks import check_flag, check_kind, check_number


def gs_jacobi_notation(
    report: CalibrationReport, tolerance: float = 1e-2, *, per_segment: bool = False, call_cost: float = 32.0
) -> str:
    """Proposes a strategy by Algorithm 1 of the paper: tough blocks by CRM, numbers of sweeps as measured.

    A tough block is cut into G segments of J sweeps. J is the number of sweeps after which all samples of the report
    were within `tolerance` of the solution, in every segment. Candidates are the numbers G in the report with
    J <= T // G, and the exact loop (G = T, J = 1). The cheapest one has the least J (T + G call_cost): the tokens
    swept, and the cost of the calls. The other blocks are swept whole, as often as the slowest of them needed.

    Args:
        report: Report of the flow.
        tolerance: One that was measured: 1e-1, 1e-2, 1e-3, 1e-4.
        per_segment: If True, each segment has its own J.
        call_cost: Fixed cost of a network call, in tokens: about 32 for a batch of 1 on a CPU, more on a GPU, less for
            a larger batch.

    Returns:
        The strategy in the paper's notation, [Stack-GS-J-Else]; or Jacobi-J if no block is tough.

    Raises:
        ValueError: If CRM is not defined or the tolerance was not measured.

    Example:
        >>> report = jf.CalibrationReport.load(jf.find_report(jf.load("fashion-p2")))
        >>> gs_jacobi_notation(report)
        '[7-196-1-10]'
    """
    check_kind("report", report, CalibrationReport, "a CalibrationReport, as calibrate returns")
    tolerance, call_cost = check_number("tolerance", tolerance), check_number("call_cost", call_cost)
    check_flag("per_segment", per_segment)
    tough = report.tough_blocks
    needed = report.slowest_sweeps("noise", tolerance)
    others = max(1, *(sweeps for block, sweeps in enumerate(needed) if block not in tough))
    if not tough:
        return f"Jacobi-{others}"
    cheapest = [_cheapest_segments(report, block, tolerance, per_segment, call_cost) for block in tough]
    stack, segments, sweeps = ("/".join(map(str, column)) for column in (tough, *zip(*cheapest, strict=True)))
    return f"[{stack}-{segments}-{sweeps}-{others}]"


def _cheapest_segments(
    report: CalibrationReport, block: int, tolerance: float, per_segment: bool, call_cost: float
) -> tuple[int, str]:
    """Returns the number of segments of a tough block, and its sweeps as text."""
    num_tokens = report.num_tokens
    candidates = [(num_tokens * (1 + call_cost), num_tokens, "1")]
    for num_segments, curves in report.segment_curves.get(block, {}).items():
        sweeps = [max(1, *curve.sweeps_to_tolerance(tolerance, num_tokens)) for curve in curves]
        if max(sweeps) <= num_tokens // num_segments:
            total = sum(sweeps) if per_segment else num_segments * max(sweeps)
            text = ",".join(map(str, sweeps)) if per_segment else str(max(sweeps))
            candidates.append((total * (num_tokens / num_segments + call_cost), num_segments, text))
    return min(candidates, key=lambda candidate: candidate[0])[1:]
