"""Facts of calibrations and of timed strategies, as docs/paper.md has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jacobiflow as jf
from benchmarks.lib.results import Json
from benchmarks.lib.timing import IN_PYTORCH
from benchmarks.performance import TOLERANCE
from jacobiflow.calibration import rank_correlation
from jacobiflow.calibration.report import GUESSES
from jacobiflow.comparison.baselines import GROWING_CACHE

PIXEL_BOUND = 1e-2  # the largest error of a pixel at which a strategy counts as right, and the bound of segments
PAPER = ("[", "Jacobi-")  # how the names of the paper's strategies begin


def number_range(values: Sequence[float], form: str = ".1f") -> str:
    """The least and the largest value; a dash if there is none."""
    if not values:
        return "-"
    least, largest = (format(end(values), form) for end in (min, max))
    return least if least == largest else f"{least} to {largest}"


def segment_sweeps(report: jf.CalibrationReport, block: int) -> list[float]:
    curves = report.segment_curves[block][report.settings.segments]
    counts = [curve.sweeps_to_tolerance(PIXEL_BOUND, report.num_tokens) for curve in curves]
    return [sum(each) / len(each) for each in counts]


def mean_sweeps(report: jf.CalibrationReport, block: int) -> list[float]:
    """Mean sweeps of a block from each guess."""
    return [report.mean_sweeps("noise", TOLERANCE, guess)[block] for guess in GUESSES]


def easy_blocks(report: jf.CalibrationReport) -> list[int]:
    return [block for block in range(report.num_blocks) if block not in report.tough_blocks]


def tough_share(report: jf.CalibrationReport, metrics: Any) -> str:
    return f"{sum(metrics.crm_percent[block] for block in report.tough_blocks):.1f}%"


def sweeps_range(report: jf.CalibrationReport, tough: bool) -> str:
    """Mean sweeps of the tough blocks, or of the others, and of the slowest sample."""
    blocks = report.tough_blocks if tough else easy_blocks(report)
    mean, slowest = report.mean_sweeps("noise", TOLERANCE), report.slowest_sweeps("noise", TOLERANCE)
    return f"{number_range([mean[i] for i in blocks])} ({max((slowest[i] for i in blocks), default=0)})"


def guess_wins(report: jf.CalibrationReport, guess: str) -> int:
    return sum(report.best_guess(block) == guess for block in range(report.num_blocks))


def best_guess(report: jf.CalibrationReport) -> str:
    """The guess with the smallest IGM in most blocks."""
    best = max(GUESSES, key=lambda guess: guess_wins(report, guess))
    return f"{best}, in {guess_wins(report, best)} of {report.num_blocks} blocks"


def agreement(reports: Mapping[str, jf.CalibrationReport], timed: Sequence[Json]) -> list[tuple[str, list[str]]]:
    """The evidence for the paper's claims: a line for each fact, a cell for each model."""
    columns = [facts_of_report(report) for report in reports.values()]
    more = [facts_of_strategies(result["runs"]) for result in timed]
    return [(fact, [column[fact] for column in part]) for part in (columns, more) for fact in part[0]]


def facts_of_report(report: jf.CalibrationReport) -> dict[str, str]:
    tough, easy, blocks = report.tough_blocks, easy_blocks(report), range(report.num_blocks)
    sweeps = report.mean_sweeps("noise", TOLERANCE)
    z, zeros = (report.mean_sweeps("noise", TOLERANCE, guess) for guess in GUESSES)
    by_norm = {norm: report.metrics[norm] for norm in (2, "fro", 1)}
    by_class = report.class_metrics.values()
    shares = [sum(metrics.crm_percent[block] for block in tough) for metrics in by_class]
    deviations = [spread.crm_rank.std for spread in report.class_spread() if spread.crm_rank is not None]
    segments = {block: segment_sweeps(report, block) for block in report.segment_curves}
    correlations = {block: rank_correlation(report.segment_metrics[block].crm, segments[block]) for block in segments}
    return {
        "tough blocks in the spectral, the Frobenius and the 1-norm": "; ".join(
            ", ".join(map(str, metrics.tough_blocks)) for metrics in by_norm.values()
        ),
        "classes with the same tough blocks; least share of theirs in a class": (
            f"{sum(metrics.tough_blocks == tough for metrics in by_class)} of {len(by_class)}; {min(shares):.1f}%"
        ),
        "sweeps of the easiest tough block over those of the slowest other": (
            f"{min(sweeps[i] for i in tough) / max(sweeps[i] for i in easy):.2f}"
        ),
        "rank correlation of CRM, and of \\|Γ\\|, with the sweeps": "; ".join(
            f"{report.rank_correlation(metric, 'noise', TOLERANCE):.2f}" for metric in ("crm", "gamma")
        ),
        "blocks where z has a smaller IGM than 0": f"{guess_wins(report, 'latent')} of {len(blocks)}",
        "blocks where z takes fewer sweeps than 0": f"{sum(z[i] < zeros[i] for i in blocks)} of {len(blocks)}",
        "rank correlation of CRM with the spectral one: Frobenius norm; 1-norm": "; ".join(
            f"{rank_correlation(by_norm[norm].crm, report.crm):.2f}" for norm in ("fro", 1)
        ),
        "largest standard deviation of a block's rank over classes; blocks where it is 0": (
            f"{max(deviations):.2f}; {sum(std == 0 for std in deviations)} of {len(deviations)}"
        ),
        "sweeps to 1e-2 of the first segment, and of the others": "; ".join(
            f"block {block}: {counts[0]:.1f}, {number_range(counts[1:])}" for block, counts in segments.items()
        ),
        "rank correlation of the segments' CRM with their sweeps": "; ".join(
            f"block {block}: {value:.2f}" for block, value in correlations.items()
        ),
    }


def facts_of_strategies(runs: Sequence[Json]) -> dict[str, str]:
    """Facts from the runs of MODEL-strategies.json, with a value for every batch size of the paper's strategies."""
    tables = [run["rows"] for run in runs if any(row["strategy"].startswith(PAPER) for row in run["rows"])]

    def cells(strategy: str | tuple[str, ...], value: Callable[[Json], float], form: str) -> str:
        values = [[value(row) for row in rows if row["strategy"].startswith(strategy)] for rows in tables]
        return "; ".join(format(max(each), form) if max(each) else "-" for each in values)

    def speed_up(row: Json) -> float:
        return row["speed_up"][GROWING_CACHE] if row["error"]["max"] <= PIXEL_BOUND else 0.0

    return {
        "largest error of `Jacobi-30` at batch 1; 4; 16": cells("Jacobi-30", lambda row: row["error"]["max"], ".0e"),
        "the fastest of the paper's strategies with no pixel more than 1e-2 off, speed-up": cells(
            PAPER, speed_up, ".2f"
        ),
        "the exact loop in PyTorch, speed-up": cells(IN_PYTORCH, speed_up, ".2f"),
    }
