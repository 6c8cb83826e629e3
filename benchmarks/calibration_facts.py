"""What a calibration says in short, a column or a line for each model: the first and the last table of
docs/calibration.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from filling import table

import jacobiflow as jf
from jacobiflow.calibration import rank_correlation
from jacobiflow.calibration.report import GUESS_NAMES

BOUND, TOLERANCE = 1e-2, 1e-3  # of a pixel in the tables of strategies, and of segments; of sweeps elsewhere
OF_PAPER = ("[", "Jacobi-")  # how its strategies are named

Found = list[dict[str, Any]]  # the rows of MODEL-strategies.json


def listed(blocks: Iterable[int]) -> str:
    """Numbers of blocks; "none" where there are none."""
    return ", ".join(map(str, blocks)) or "none"


def span(values: Sequence[float], form: str = ".1f") -> str:
    """The least and the largest; a dash where there are none."""
    if not values:
        return "-"
    least, most = (format(end(values), form) for end in (min, max))
    return least if least == most else f"{least} to {most}"


def segment_sweeps(report: jf.Report, block: int) -> list[float]:
    """Mean sweeps of the segments of a tough block."""
    traces = report.segment_traces[block][report.settings.segments]
    counts = [[report.num_tokens if c is None else c for c in trace.reach(BOUND)] for trace in traces]
    return [sum(each) / len(each) for each in counts]


# -------------------------------------------------------------------------------------------------------- at the start


def summary(reports: Mapping[str, jf.Report]) -> str:
    """A line for each model."""
    columns = (
        "model", "T", "C", "blocks", "tough by CRM", "their share of it", "sweeps there: mean (slowest sample)",
        "sweeps elsewhere", "best guess by IGM",
    )  # fmt: skip
    lines = []
    for model, report in reports.items():
        mean, slowest = report.mean_sweeps("noise", TOLERANCE), report.slowest_sweeps("noise", TOLERANCE)
        counts = [
            f"{span([mean[i] for i in blocks])} ({span([max((slowest[i] for i in blocks), default=0)], 'd')})"
            for blocks in _sides(report)
        ]
        wins = {name: _wins(report, name) for name in GUESS_NAMES}
        best = max(wins, key=wins.__getitem__)
        lines.append((
            f"`{model}`", str(report.num_tokens), str(report.token_channels), str(report.num_blocks),
            listed(report.tough_blocks), _share(report, report.metrics[report.settings.norm]), *counts,
            f"{best.replace('_', ' ')}, in {wins[best]} of {report.num_blocks} blocks",
        ))  # fmt: skip
    return table(columns, lines)


def _sides(report: jf.Report) -> tuple[list[int], list[int]]:
    """The tough blocks by CRM, and the others."""
    tough = list(report.tough_blocks)
    return tough, [block for block in range(report.num_blocks) if block not in tough]


def _wins(report: jf.Report, guess: str) -> int:
    return sum(report.best_guess(block) == guess for block in range(report.num_blocks))


def _share(report: jf.Report, metrics: Any) -> str:
    return f"{sum(metrics.crm_percent[block] for block in report.tough_blocks):.1f}%"


# ---------------------------------------------------------------------------------------------------------- at the end


def agreement(reports: Mapping[str, jf.Report], tried: Mapping[str, dict[str, Any]]) -> str:
    """What the paper's claims rest on, a column for each model."""
    lines: list[list[str]] = []
    for said, fact in FACTS.items():
        lines.append([said, *(fact(report) for report in reports.values())])
    for said, timed in TIMED.items():
        lines.append([said, *(timed(tried[model]["rows"]) for model in reports)])
    return table(("", *(f"`{model}`" for model in reports)), lines)


def _tough(report: jf.Report) -> str:
    return "; ".join(listed(report.metrics[norm].tough_blocks) for norm in (2, "fro", 1))


def _classes(report: jf.Report) -> str:
    same = [metrics for metrics in report.class_metrics.values() if metrics.tough_blocks == report.tough_blocks]
    least = min(report.class_metrics.values(), key=lambda m: sum(m.crm_percent[b] for b in report.tough_blocks))
    return f"{len(same)} of {len(report.class_metrics)}; {_share(report, least)}"


def _gap(report: jf.Report) -> str:
    mean, (tough, others) = report.mean_sweeps("noise", TOLERANCE), _sides(report)
    return f"{min(mean[i] for i in tough) / max(mean[i] for i in others):.2f}" if tough else "-"


def _saved(report: jf.Report) -> str:
    z, affine = (report.mean_sweeps("noise", TOLERANCE, guess) for guess in ("latent", "mean_affine"))
    return "; ".join(span([z[i] - affine[i] for i in blocks]) for blocks in _sides(report))


def _better(report: jf.Report) -> str:
    z, zeros = (report.mean_sweeps("noise", TOLERANCE, guess) for guess in ("latent", "zeros"))
    return f"{sum(a < b for a, b in zip(z, zeros, strict=True))} of {report.num_blocks}"


def _other_norms(report: jf.Report) -> str:
    return "; ".join(f"{rank_correlation(report.metrics[norm].crm, report.crm):.2f}" for norm in ("fro", 1))


def _ranks(report: jf.Report) -> str:
    spreads = [spread.rank.std for spread in report.class_spread() if spread.rank is not None]
    return f"{max(spreads):.2f}; {sum(std == 0 for std in spreads)} of {len(spreads)}"


def _segments(report: jf.Report) -> str:
    return _each_tough(report, lambda metrics, sweeps: f"{sweeps[0]:.1f}, {span(sweeps[1:])}")


def _segment_ranks(report: jf.Report) -> str:
    return _each_tough(report, lambda metrics, sweeps: f"{rank_correlation(metrics.crm, sweeps):.2f}")


def _each_tough(report: jf.Report, cell: Callable[[Any, list[float]], str]) -> str:
    """A cell of the segments' metrics and sweeps for each tough block."""
    found = (f"block {b}: {cell(report.segment_metrics[b], segment_sweeps(report, b))}" for b in report.segment_traces)
    return "; ".join(found) or "-"


def _by_batch(rows: Found, cell: Callable[[Found], str]) -> str:
    batches = sorted({row["batch"] for row in rows if row["strategy"].startswith(OF_PAPER)})
    return "; ".join(cell([row for row in rows if row["batch"] == batch]) for batch in batches)


def _entry(rows: Found, name: str, entry: str, form: str) -> str:
    return _by_batch(rows, lambda some: next(format(row[entry], form) for row in some if row["strategy"] == name))


def _fastest(rows: Found) -> str:
    def rate(some: Found) -> str:
        within = [row["rate"] for row in some if row["strategy"].startswith(OF_PAPER) and row["max_error"] <= BOUND]
        return f"{max(within):.2f}" if within else "-"

    return _by_batch(rows, rate)


FACTS: Mapping[str, Callable[[jf.Report], str]] = {
    "tough blocks in the spectral, the Frobenius and the 1-norm": _tough,
    "classes with the same tough blocks; least share of theirs in a class": _classes,
    "sweeps of the easiest tough block over those of the slowest other": _gap,
    "rank correlation of CRM, and of \\|Γ\\|, with the sweeps": lambda r: "; ".join(
        f"{r.rank_correlation(metric, 'noise', TOLERANCE):.2f}" for metric in ("crm", "gamma")
    ),
    "blocks where mean affine has the least IGM": lambda r: f"{_wins(r, 'mean_affine')} of {r.num_blocks}",
    "blocks where z takes fewer sweeps than 0": _better,
    "sweeps that mean affine saves over z: in tough blocks; in the others": _saved,
    "rank correlation of CRM with the spectral one: Frobenius norm; 1-norm": _other_norms,
    "largest standard deviation of a block's rank over classes; blocks where it is 0": _ranks,
    "sweeps to 1e-2 of the first segment, and of the others": _segments,
    "rank correlation of the segments' CRM with their sweeps": _segment_ranks,
}
TIMED: Mapping[str, Callable[[Found], str]] = {
    "largest error of `Jacobi-30` at batch 1; 4; 16": lambda rows: _entry(rows, "Jacobi-30", "max_error", ".0e"),
    "the fastest of the paper's strategies with no pixel more than 1e-2 off, times as fast as Original": _fastest,
    "the sequential loop in PyTorch, times as fast as Original": lambda rows: _entry(
        rows, "sequential, in PyTorch", "rate", ".2f"
    ),
}
