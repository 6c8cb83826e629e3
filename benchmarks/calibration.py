"""Facts that docs/calibration.md derives from the reports of the bundled models.

`python -m benchmarks.calibration MODEL REPORT` writes docs/results/MODEL-calibration-guided.json.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jacobiflow as jf
from benchmarks.common import RESULTS
from jacobiflow.calibration import rank_correlation
from jacobiflow.calibration.report import GUESS_NAMES
from jacobiflow.files import write_json

PIXEL_BOUND = 1e-2  # the largest error of a pixel at which a strategy counts as right, and the bound of segments
TOLERANCE = 1e-3
PAPER = ("[", "Jacobi-")  # how the names of the paper's strategies begin

Rows = Sequence[Mapping[str, Any]]  # of MODEL-strategies.json


def number_range(values: Sequence[float], form: str = ".1f") -> str:
    """The least and the largest value; a dash if there is none."""
    if not values:
        return "-"
    least, largest = (format(end(values), form) for end in (min, max))
    return least if least == largest else f"{least} to {largest}"


def segment_sweeps(report: jf.Report, block: int) -> list[float]:
    """Mean sweeps of each segment of a tough block."""
    traces = report.segment_traces[block][report.settings.segments]
    counts = [[report.num_tokens if count is None else count for count in trace.reach(PIXEL_BOUND)] for trace in traces]
    return [sum(each) / len(each) for each in counts]


def mean_sweeps(report: jf.Report, block: int) -> list[float]:
    """Mean sweeps of a block from each guess."""
    return [report.mean_sweeps("noise", TOLERANCE, guess)[block] for guess in GUESS_NAMES]


def easy_blocks(report: jf.Report) -> list[int]:
    """The blocks that are not tough by CRM."""
    return [block for block in range(report.num_blocks) if block not in report.tough_blocks]


def tough_share(report: jf.Report, metrics: Any) -> str:
    """The share of the tough blocks in the sum of CRM."""
    return f"{sum(metrics.crm_percent[block] for block in report.tough_blocks):.1f}%"


def sweeps_range(report: jf.Report, tough: bool) -> str:
    """Mean sweeps of the tough blocks, or of the others, and of the slowest sample."""
    blocks = report.tough_blocks if tough else easy_blocks(report)
    mean, slowest = report.mean_sweeps("noise", TOLERANCE), report.slowest_sweeps("noise", TOLERANCE)
    return f"{number_range([mean[i] for i in blocks])} ({max((slowest[i] for i in blocks), default=0)})"


def guess_wins(report: jf.Report, guess: str) -> int:
    """The number of blocks in which a guess has the smallest IGM."""
    return sum(report.best_guess(block) == guess for block in range(report.num_blocks))


def best_guess(report: jf.Report) -> str:
    """The guess with the smallest IGM in most blocks."""
    best = max(GUESS_NAMES, key=lambda guess: guess_wins(report, guess))
    return f"{best.replace('_', ' ')}, in {guess_wins(report, best)} of {report.num_blocks} blocks"


def agreement(reports: Mapping[str, jf.Report], timed: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The evidence for the paper's claims: a line for each fact, a cell for each model."""
    facts = [(fact, [cell(report) for report in reports.values()]) for fact, cell in REPORT_FACTS.items()]
    return facts + [(fact, [cell(result["rows"]) for result in timed]) for fact, cell in STRATEGY_FACTS.items()]


def _classes(report: jf.Report) -> str:
    same = sum(metrics.tough_blocks == report.tough_blocks for metrics in report.class_metrics.values())
    least = min(report.class_metrics.values(), key=lambda m: sum(m.crm_percent[b] for b in report.tough_blocks))
    return f"{same} of {len(report.class_metrics)}; {tough_share(report, least)}"


def _gap(report: jf.Report) -> str:
    mean = report.mean_sweeps("noise", TOLERANCE)
    return f"{min(mean[i] for i in report.tough_blocks) / max(mean[i] for i in easy_blocks(report)):.2f}"


def _saved_by_mean_affine(report: jf.Report) -> str:
    z, affine = (report.mean_sweeps("noise", TOLERANCE, guess) for guess in ("latent", "mean_affine"))
    sides = (report.tough_blocks, easy_blocks(report))
    return "; ".join(number_range([z[i] - affine[i] for i in blocks]) for blocks in sides)


def _z_before_zeros(report: jf.Report) -> str:
    z, zeros = (report.mean_sweeps("noise", TOLERANCE, guess) for guess in ("latent", "zeros"))
    return f"{sum(a < b for a, b in zip(z, zeros, strict=True))} of {report.num_blocks}"


def _ranks_over_classes(report: jf.Report) -> str:
    deviations = [spread.rank.std for spread in report.class_spread() if spread.rank is not None]
    return f"{max(deviations):.2f}; {sum(std == 0 for std in deviations)} of {len(deviations)}"


def _by_tough_block(cell: Callable[[Any, list[float]], str]) -> Callable[[jf.Report], str]:
    def cells(report: jf.Report) -> str:
        return "; ".join(
            f"block {block}: {cell(report.segment_metrics[block], segment_sweeps(report, block))}"
            for block in report.segment_traces
        )

    return cells


def _by_batch(cell: Callable[[Rows], str]) -> Callable[[Rows], str]:
    def cells(rows: Rows) -> str:
        batches = sorted({row["batch"] for row in rows if row["strategy"].startswith(PAPER)})
        return "; ".join(cell([row for row in rows if row["batch"] == batch]) for batch in batches)

    return cells


def _entry(name: str, key: str, form: str) -> Callable[[Rows], str]:
    return _by_batch(lambda rows: format(next(row[key] for row in rows if row["strategy"] == name), form))


def _fastest(rows: Rows) -> str:
    rates = [row["rate"] for row in rows if row["strategy"].startswith(PAPER) and row["max_error"] <= PIXEL_BOUND]
    return f"{max(rates):.2f}" if rates else "-"


REPORT_FACTS: Mapping[str, Callable[[jf.Report], str]] = {
    "tough blocks in the spectral, the Frobenius and the 1-norm": lambda report: "; ".join(
        ", ".join(map(str, report.metrics[norm].tough_blocks)) for norm in (2, "fro", 1)
    ),
    "classes with the same tough blocks; least share of theirs in a class": _classes,
    "sweeps of the easiest tough block over those of the slowest other": _gap,
    "rank correlation of CRM, and of \\|Γ\\|, with the sweeps": lambda report: "; ".join(
        f"{report.rank_correlation(metric, 'noise', TOLERANCE):.2f}" for metric in ("crm", "gamma")
    ),
    "blocks where mean affine has the least IGM": lambda report: (
        f"{guess_wins(report, 'mean_affine')} of {report.num_blocks}"
    ),
    "blocks where z takes fewer sweeps than 0": _z_before_zeros,
    "sweeps that mean affine saves over z: in tough blocks; in the others": _saved_by_mean_affine,
    "rank correlation of CRM with the spectral one: Frobenius norm; 1-norm": lambda report: "; ".join(
        f"{rank_correlation(report.metrics[norm].crm, report.crm):.2f}" for norm in ("fro", 1)
    ),
    "largest standard deviation of a block's rank over classes; blocks where it is 0": _ranks_over_classes,
    "sweeps to 1e-2 of the first segment, and of the others": _by_tough_block(
        lambda metrics, sweeps: f"{sweeps[0]:.1f}, {number_range(sweeps[1:])}"
    ),
    "rank correlation of the segments' CRM with their sweeps": _by_tough_block(
        lambda metrics, sweeps: f"{rank_correlation(metrics.crm, sweeps):.2f}"
    ),
}
STRATEGY_FACTS: Mapping[str, Callable[[Rows], str]] = {
    "largest error of `Jacobi-30` at batch 1; 4; 16": _entry("Jacobi-30", "max_error", ".0e"),
    "the fastest of the paper's strategies with no pixel more than 1e-2 off, times as fast as Original": _by_batch(
        _fastest
    ),
    "the sequential loop in PyTorch, times as fast as Original": _entry("sequential, in PyTorch", "rate", ".2f"),
}


def write_guided(model: str, report: jf.Report) -> None:
    """Writes what the page shows of a calibration under guidance."""
    sweeps = {guess: {f"{TOLERANCE:g}": report.mean_sweeps("noise", TOLERANCE, guess)} for guess in GUESS_NAMES}
    write_json(RESULTS / f"{model}-calibration-guided.json", {
        "model": model, "guess": [report.best_guess(block) for block in range(report.num_blocks)],
        "crm_percent": report.crm_percent, "gamma": [sum(norms) / len(norms) for norms in report.gamma],
        "mean_sweeps": {"noise": sweeps},
    })  # fmt: skip


if __name__ == "__main__":
    write_guided(sys.argv[1], jf.Report.load(sys.argv[2]))
