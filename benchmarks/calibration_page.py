"""Puts the tables of docs/results into docs/calibration.md: `python benchmarks/calibration_page.py`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filling import fill

import jacobiflow as jf
from jacobiflow.calibration import rank_correlation
from jacobiflow.calibration.convergence import TOLERANCES
from jacobiflow.calibration.report import GUESS_NAMES, Spread

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
REPORT = ROOT / "src" / "jacobiflow" / "models" / "fashion-p2" / "report.json"
GUESSES = ("z", "0", "mean affine")  # as GUESS_NAMES has them
BOUND = 1e-2


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first to the right."""
    lines = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def per_block(report: jf.Report, columns: Sequence[str], cells: Callable[[int], Sequence[str]]) -> str:
    """A table with a line for each block."""
    return table(("", *columns), ((f"Block{i}", *cells(i)) for i in range(report.num_blocks)))


def bold_least(values: Mapping[str, float]) -> list[str]:
    """The numbers, the smallest bold."""
    least = min(values.values())
    return [f"**{value:.2f}**" if value == least else f"{value:.2f}" for value in values.values()]


def igm(report: jf.Report) -> str:
    """Table 1, and the sweeps beside it."""
    sweeps = {name: report.mean_sweeps("noise", 1e-3, name) for name in GUESS_NAMES}
    columns = (*(f"IGM from {name}" for name in GUESSES), *(f"sweeps from {name}" for name in GUESSES))

    def cells(i: int) -> list[str]:
        return bold_least(report.igm[i]) + bold_least({name: sweeps[name][i] for name in GUESS_NAMES})

    return per_block(report, columns, cells)


def crm(report: jf.Report) -> str:
    """Tables 2 and 6, and what they stand for."""
    mean, slowest = report.mean_sweeps("noise", 1e-3), report.slowest_sweeps("noise", 1e-3)
    columns = ("\\|Σ⁻¹X\\|", "\\|W_s\\|", "\\|W_u\\|", "CRM", "percent", "sweeps, mean", "sweeps, slowest", "\\|Γ\\|")

    def cells(i: int) -> list[str]:
        mark = "**" if i in report.tough_blocks else ""
        parts = [f"{value:.2f}" for value in (report.components or ())[i]]
        gamma = sum(report.gamma[i]) / len(report.gamma[i])
        found = [f"{mark}{report.crm[i]:.2f}{mark}", f"{mark}{report.crm_percent[i]:.2f}{mark}"]
        return [*parts, *found, f"{mean[i]:.1f}", str(slowest[i]), f"{gamma:.2f}"]

    return per_block(report, columns, cells)


def sweeps(report: jf.Report) -> str:
    """Mean sweeps to each tolerance, from images' latents and fresh ones."""
    columns = [f"{start}, {tolerance:g}" for start in report.traces for tolerance in TOLERANCES]
    counts = [report.mean_sweeps(start, tolerance) for start in report.traces for tolerance in TOLERANCES]
    return per_block(report, columns, lambda i: [f"{row[i]:.1f}" for row in counts])


def ranking(report: jf.Report) -> str:
    """Spearman's correlation of each metric with the sweeps."""
    columns = ["metric", *(f"{start}, {tolerance:g}" for start in report.traces for tolerance in TOLERANCES)]
    rows = []
    for metric, name in (("crm", "CRM"), ("gamma", "\\|Γ\\|")):
        found = [report.rank_correlation(metric, start, t) for start in report.traces for t in TOLERANCES]  # type: ignore[arg-type]
        rows.append((name, *(f"{value:.2f}" for value in found)))
    return table(columns, rows)


def norms(report: jf.Report) -> str:
    """Table 7."""
    parts = []
    for norm, name in (("fro", "Frobenius norm"), (1, "1-norm")):
        metrics = report.metrics[norm]  # type: ignore[index]
        columns = (*(f"IGM from {guess}" for guess in GUESSES), "CRM", "percent")

        def cells(i: int, metrics: Any = metrics) -> list[str]:
            return [*bold_least(metrics.igm[i]), f"{metrics.crm[i]:.2f}", f"{metrics.crm_percent[i]:.2f}"]

        agreement = rank_correlation(metrics.crm, report.crm)
        tough = ", ".join(map(str, metrics.tough_blocks)) or "none"
        parts.append(
            f"{name}; tough blocks: {tough}; rank correlation of its CRM with the spectral one {agreement:.2f}.\n\n"
            + per_block(report, columns, cells)
        )
    return "\n\n".join(parts)


def classes(report: jf.Report) -> str:
    """Tables 8 and 9."""
    spread = report.class_spread()
    ranks = [1 + sum(other < crm for other in report.crm) for crm in report.crm]

    def cells8(i: int) -> list[str]:
        return [str(ranks[i]), f"{report.crm_percent[i]:.2f}", shown(spread[i].rank), shown(spread[i].percent)]

    def cells9(i: int) -> list[str]:
        mixed = [f"{report.igm[i][name]:.2f}" for name in GUESS_NAMES]
        over = [shown(spread[i].igm[name]) for name in GUESS_NAMES]
        return [*mixed, *over, "/".join(str(spread[i].wins[name]) for name in GUESS_NAMES)]

    count = len(report.class_metrics)
    first = per_block(report, ("rank, mixed", "percent, mixed", f"rank, {count} classes", "percent"), cells8)
    columns = (
        *(f"{g}, mixed" for g in GUESSES),
        *(f"{g}, {count} classes" for g in GUESSES),
        "wins of " + "/".join(GUESSES),
    )
    return f"{first}\n\n{per_block(report, columns, cells9)}"


def shown(spread: Spread | None) -> str:
    """Mean and standard deviation."""
    return "" if spread is None else f"{spread.mean:.2f} ± {spread.std:.2f}"


def segments(report: jf.Report) -> str:
    """Metrics of the tough blocks' segments, and their sweeps."""
    parts = []
    for block, counts in report.segment_traces.items():
        metrics, traces = report.segment_metrics[block], counts[report.settings.segments]
        slowest = [trace.slowest(BOUND) or report.num_tokens for trace in traces]
        mean = [sum(c or 0 for c in trace.reach(BOUND)) / report.settings.traced for trace in traces]
        rows = (
            (
                f"segment {i + 1}",
                *bold_least(metrics.igm[i]),
                f"{metrics.crm[i]:.2f}",
                f"{mean[i]:.1f}",
                str(slowest[i]),
            )
            for i in range(len(traces))
        )
        columns = (
            f"block {block}",
            *(f"IGM from {guess}" for guess in GUESSES),
            "CRM",
            "sweeps, mean",
            "sweeps, slowest",
        )
        parts.append(
            f"{table(columns, rows)}\n\nRank correlation of the segments' CRM with their mean sweeps to {BOUND:g}: "
            f"{rank_correlation(metrics.crm, mean):.2f}."
        )
    return "\n\n".join(parts)


def guided(figures: dict[str, Any]) -> str:
    """Sweeps under guidance."""
    guess, noise = figures["guess"], figures["mean_sweeps"]["noise"]
    rows = (
        (f"Block{i}", f"{figures['crm_percent'][i]:.2f}", *(f"{noise[name]['0.001'][i]:.1f}" for name in GUESS_NAMES),
         f"{figures['gamma'][i]:.2f}", guess[i].replace("_", " "))
        for i in range(len(guess))
    )  # fmt: skip
    return table(("", "CRM percent", *(f"sweeps from {g}" for g in GUESSES), "\\|Γ\\|", "guess by IGM"), rows)


def strategies(result: dict[str, Any]) -> str:
    """Tables 3 and 4: paired error in place of FID."""
    batches = sorted({row["batch"] for row in result["rows"]})
    by_name: dict[str, dict[int, Any]] = {}
    for row in result["rows"]:
        by_name.setdefault(row["strategy"], {})[row["batch"]] = row
    lines = []
    for name, rows in by_name.items():
        cells = [name]
        for batch in batches:
            row = rows[batch]
            good = row.get("max_error", 0) <= BOUND
            rate = f"**{row['rate']:.2f}**" if good else f"{row['rate']:.2f}"
            error = f"{row['max_error']:.0e}, {row['mean_error']:.0e}" if "max_error" in row else ""
            cells += [error, f"{row['seconds']:.2f} ({rate})"]
        lines.append([*cells, str(rows[batches[0]].get("network_calls", ""))])
    columns = ["strategy"]
    for batch in batches:
        columns += [f"batch {batch}: error max, mean", "seconds (times as fast)"]
    machine = result["machine"]
    processor = f"{machine['cores']} cores of {machine['processor']}"
    where = f"{processor}, {machine['threads']} threads, PyTorch {machine['torch']}"
    return f"{table([*columns, 'calls'], lines)}\n\nMeasured on {where}."


def parts() -> dict[str, str]:
    """What the page shows of the result files, by its marks."""
    report = jf.Report.load(REPORT)
    under_guidance = json.loads((RESULTS / "calibration-guided.json").read_text())
    timed = json.loads((RESULTS / "strategies.json").read_text())
    return {
        "igm": igm(report), "crm": crm(report), "sweeps": sweeps(report), "ranking": ranking(report),
        "norms": norms(report), "classes": classes(report), "segments": segments(report),
        "guided": guided(under_guidance), "strategies": strategies(timed),
    }  # fmt: skip


if __name__ == "__main__":
    fill(ROOT / "docs" / "calibration.md", parts())
