"""GS-Jacobi is a strategy of this library; here are the settings that its paper tries.

Reference: Liu and Qin, Accelerate TarFlow Sampling with GS-Jacobi Iteration, arXiv 2505.12849, Tables 3 and 4.
"""

from __future__ import annotations

from jacobiflow.calibration import Report
from jacobiflow.checks import check_flag, check_kind

# Sweeps of the other blocks, Else: those of the tables, and 12, 14, 16, for models that need a few more than 10.
_ELSE = (6, 8, 10, 12, 14, 16, 20, 30)
_PAIRED_ELSE = (6, 10, 12, 14, 16, 20)
# Table 4b: segments and sweeps of the second tough block, the tougher one being solved token by token.
_SECOND = ((1, 64), (2, 32), (4, 16), (8, 8), (4, 24), (8, 13))


def gs_jacobi_grid(report: Report | None, short: bool = False) -> list[str]:
    """The settings of the paper's Tables 3 and 4 for the tough blocks of a report, as names for `Strategy.parse`.

    Tough blocks are solved token by token, or in segments: segments and sweeps multiply to 128 and 256 as published,
    and to T/8 and T/4, which these are where T is 1024. Each comes with several numbers of sweeps for the other blocks.
    A model of two tough blocks also has the settings of Table 4b, where the tougher of them has more segments. Without
    a report, or a tough block in it, only Jacobi-30 and Jacobi-60 are left.

    **Arguments:** `short` leaves 8 settings at most beside these two, few enough to draw thousands of samples by each:
    T/8 and T/4 in 1, 4 or 8 segments, and 6 sweeps elsewhere.
    """
    check_kind("report", report, Report | None, "a Report, as calibrate returns, or None")
    check_flag("short", short)
    names = ["Jacobi-30", "Jacobi-60"]
    tough = () if report is None or report.components is None else report.tough_blocks
    if report is None or not tough:
        return names
    length, crm = report.num_tokens, report.crm
    tough = tuple(sorted(tough, key=lambda block: -crm[block]))
    stack = "/".join(map(str, tough))
    totals = (length // 8, length // 4) if short else (128, 256, length // 8, length // 4)
    counts = (1, 4, 8) if short else (1, 2, 4, 8, 16, 32)
    names += [f"[{stack}-{length}-1-{rest}]" for rest in ((6, 10) if short else _ELSE)]
    for total in totals:
        for count in counts:
            if count <= min(total, length):
                names += [f"[{stack}-{count}-{total // count}-{rest}]" for rest in ((6,) if short else _PAIRED_ELSE)]
    if len(tough) == 2 and not short:
        names += [f"[{stack}-{length}/{count}-1/{sweeps}-6]" for count, sweeps in _SECOND if count <= length]
        names += [f"[{stack}-16/8-{sweeps}/13-6]" for sweeps in (8, 10, 12) if length >= 16]
    return list(dict.fromkeys(names))
