"""Puts the tables of docs/results and the reports into docs/calibration.md: `python benchmarks/calibration_page.py`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from calibration_facts import BOUND, agreement, listed, segment_sweeps, summary
from filling import fill, measured_on, table

import jacobiflow as jf
from jacobiflow.calibration import rank_correlation
from jacobiflow.calibration.convergence import TOLERANCES
from jacobiflow.calibration.metrics import Norm
from jacobiflow.calibration.report import GUESS_NAMES, Spread, Start

ROOT = Path(__file__).resolve().parent.parent
RESULTS, BUNDLED = ROOT / "docs" / "results", ROOT / "src" / "jacobiflow" / "models"
MODELS = ("fashion-p2", "emoji-p2", "digits-p1")
GUESSES = ("z", "0", "mean affine")  # as GUESS_NAMES has them
FIGURES = {  # by the number in the paper: the file of `jacobiflow trace`, and what it shows
    2: ("convergence", "Distance to the solution by sweep, a line for each block"),
    5: ("segments", "Distance to the solution by sweep in each segment of the tough blocks, and of all tokens at once"),
    3: ("sampling", "Four samples, a line each: noise, the image after each block, and the denoised image"),
    4: (
        "guesses",
        "Ten samples by combinations of guess and sweeps, with their errors, and by the sequential loop",
    ),
    7: ("comparison", "Ten samples by the sequential loop and by a strategy, and their difference"),
}

Reports = Mapping[str, jf.Report]  # by model


def grouped(columns: Sequence[str], groups: Mapping[str, Iterable[Sequence[str]]]) -> str:
    """A table whose lines come in groups, each under its name."""
    lines = []
    for name, rows in groups.items():
        lines += [[f"**{name}**", *[""] * len(columns)], *rows]
    return table(("", *columns), lines)


def per_block(reports: Reports, columns: Sequence[str], cells: Callable[[jf.Report, int], Sequence[str]]) -> str:
    """A table with a line for each block of each model."""
    return grouped(
        columns,
        {
            model: [(f"block {i}", *cells(report, i)) for i in range(report.num_blocks)]
            for model, report in reports.items()
        },
    )


def bold_least(values: Mapping[str, float]) -> list[str]:
    """The numbers, the smallest bold."""
    least = min(values.values())
    return [f"**{value:.2f}**" if value == least else f"{value:.2f}" for value in values.values()]


def igm(reports: Reports) -> str:
    """Table 1, and the sweeps beside it."""
    columns = (*(f"IGM from {name}" for name in GUESSES), *(f"sweeps from {name}" for name in GUESSES))

    def cells(report: jf.Report, i: int) -> list[str]:
        sweeps = {name: report.mean_sweeps("noise", 1e-3, name)[i] for name in GUESS_NAMES}
        return bold_least(report.igm[i]) + bold_least(sweeps)

    return per_block(reports, columns, cells)


def crm(reports: Reports) -> str:
    """Tables 2 and 6, and what they stand for."""
    columns = ("\\|Σ⁻¹X\\|", "\\|W_s\\|", "\\|W_u\\|", "CRM", "percent", "sweeps, mean", "sweeps, slowest", "\\|Γ\\|")

    def cells(report: jf.Report, i: int) -> list[str]:
        mean, slowest = report.mean_sweeps("noise", 1e-3)[i], report.slowest_sweeps("noise", 1e-3)[i]
        mark = "**" if i in report.tough_blocks else ""
        parts = [f"{value:.2f}" for value in (report.components or ())[i]]
        gamma = sum(report.gamma[i]) / len(report.gamma[i])
        found = [f"{mark}{report.crm[i]:.2f}{mark}", f"{mark}{report.crm_percent[i]:.2f}{mark}"]
        return [*parts, *found, f"{mean:.1f}", str(slowest), f"{gamma:.2f}"]

    return per_block(reports, columns, cells)


def sweeps(reports: Reports) -> str:
    """Mean sweeps to each tolerance, from images' latents and fresh ones."""
    wanted = _starts()

    def cells(report: jf.Report, i: int) -> list[str]:
        return [f"{report.mean_sweeps(start, tolerance)[i]:.1f}" for start, tolerance in wanted]

    return per_block(reports, [f"{start}, {tolerance:g}" for start, tolerance in wanted], cells)


def ranking(reports: Reports) -> str:
    """Spearman's correlation of each metric with the sweeps."""
    columns = ["model", "metric", *(f"{start}, {tolerance:g}" for start, tolerance in _starts())]
    metrics: tuple[tuple[Literal["crm", "gamma"], str], ...] = (("crm", "CRM"), ("gamma", "\\|Γ\\|"))
    rows = [
        (f"`{model}`", name, *(f"{report.rank_correlation(metric, *each):.2f}" for each in _starts()))
        for model, report in reports.items()
        for metric, name in metrics
    ]
    return table(columns, rows)


def norms(reports: Reports) -> str:
    """Table 7."""
    of: tuple[tuple[Norm, str], ...] = (("fro", "Frobenius norm"), (1, "1-norm"))
    lines = []
    for model, report in reports.items():
        for norm, name in of:
            metrics = report.metrics[norm]
            agreement = rank_correlation(metrics.crm, report.crm)
            lines.append((f"`{model}`", name, listed(metrics.tough_blocks), f"{agreement:.2f}"))
    parts = [table(("model", "norm", "tough blocks", "rank correlation of its CRM with the spectral one"), lines)]
    columns = (*(f"IGM from {guess}" for guess in GUESSES), "CRM", "percent")
    for norm, name in of:

        def cells(report: jf.Report, i: int, norm: Norm = norm) -> list[str]:
            metrics = report.metrics[norm]
            return [*bold_least(metrics.igm[i]), f"{metrics.crm[i]:.2f}", f"{metrics.crm_percent[i]:.2f}"]

        parts.append(f"In the {name}:\n\n{per_block(reports, columns, cells)}")
    return "\n\n".join(parts)


def classes(reports: Reports) -> str:
    """Tables 8 and 9."""

    def ranks(report: jf.Report, i: int) -> list[str]:
        rank, spread = 1 + sum(other < report.crm[i] for other in report.crm), report.class_spread()[i]
        return [str(rank), f"{report.crm_percent[i]:.2f}", shown(spread.rank), shown(spread.percent)]

    def guesses(report: jf.Report, i: int) -> list[str]:
        spread = report.class_spread()[i]
        mixed = [f"{report.igm[i][name]:.2f}" for name in GUESS_NAMES]
        over = [shown(spread.igm[name]) for name in GUESS_NAMES]
        return [*mixed, *over, "/".join(str(spread.wins[name]) for name in GUESS_NAMES)]

    counts = "; ".join(f"`{model}`: {len(report.class_metrics)} classes" for model, report in reports.items())
    first = per_block(reports, ("rank, mixed", "percent, mixed", "rank, by class", "percent, by class"), ranks)
    columns = (*(f"{g}, mixed" for g in GUESSES), *(f"{g}, by class" for g in GUESSES), "wins of " + "/".join(GUESSES))
    return f"{counts}.\n\n{first}\n\n{per_block(reports, columns, guesses)}"


def shown(spread: Spread | None) -> str:
    """Mean and standard deviation."""
    return "" if spread is None else f"{spread.mean:.2f} ± {spread.std:.2f}"


def segments(reports: Reports) -> str:
    """Metrics of the tough blocks' segments, and their sweeps."""
    groups = {}
    for model, report in reports.items():
        for block in report.segment_traces:
            metrics, mean = report.segment_metrics[block], segment_sweeps(report, block)
            traces = report.segment_traces[block][report.settings.segments]
            groups[f"{model}, block {block}"] = [
                (f"segment {i + 1}", *bold_least(metrics.igm[i]), f"{metrics.crm[i]:.2f}", f"{mean[i]:.1f}",
                 str(trace.slowest(BOUND) or report.num_tokens))
                for i, trace in enumerate(traces)
            ]  # fmt: skip
    return grouped((*(f"IGM from {guess}" for guess in GUESSES), "CRM", "sweeps, mean", "sweeps, slowest"), groups)


def guided(found: Mapping[str, dict[str, Any]]) -> str:
    """Sweeps under guidance."""
    groups = {}
    for model, figures in found.items():
        guess, noise = figures["guess"], figures["mean_sweeps"]["noise"]
        groups[model] = [
            (f"block {i}", f"{figures['crm_percent'][i]:.2f}", *(f"{noise[g]['0.001'][i]:.1f}" for g in GUESS_NAMES),
             f"{figures['gamma'][i]:.2f}", guess[i].replace("_", " "))
            for i in range(len(guess))
        ]  # fmt: skip
    return grouped(("CRM percent", *(f"sweeps from {g}" for g in GUESSES), "\\|Γ\\|", "guess by IGM"), groups)


def strategies(found: Mapping[str, dict[str, Any]]) -> str:
    """Tables 3 and 4, one for each model: paired error in place of FID."""
    return "\n\n".join(f"### `{model}`\n\n{timed(result)}" for model, result in found.items())


def timed(result: dict[str, Any]) -> str:
    """The table of a model."""
    batches = sorted({row["batch"] for row in result["rows"]})
    by_name: dict[str, dict[int, Any]] = {}
    for row in result["rows"]:
        by_name.setdefault(row["strategy"], {})[row["batch"]] = row
    lines = []
    for name, rows in by_name.items():
        cells = [name]
        for batch in batches:
            if batch not in rows:
                cells += ["", ""]
                continue
            row = rows[batch]
            rate = f"**{row['rate']:.2f}**" if row["max_error"] <= BOUND else f"{row['rate']:.2f}"
            cells += [f"{row['max_error']:.0e}, {row['mean_error']:.0e}", f"{row['seconds']:.3f} ({rate})"]
        lines.append([*cells, str(rows[batches[0]].get("network_calls", ""))])
    columns = ["strategy"]
    for batch in batches:
        columns += [f"batch {batch}: error max, mean", "seconds (times as fast)"]
    return f"{table([*columns, 'calls'], lines)}\n\n{measured_on(result['machine'])}"


def figure(number: int, reports: Reports) -> str:
    """A figure of the paper for every model; that of segments for those that have a tough block."""
    file, shows = FIGURES[number]
    models = [model for model, report in reports.items() if file != "segments" or report.segment_traces]
    return "\n\n".join(f"![{shows}: {model}](figures/{model}-{file}.png)" for model in models)


def grid(result: dict[str, Any]) -> str:
    """What tuning leaves out, and what plans lose by that."""
    lines = []
    for model, found in result["models"].items():
        native, swept = ([row["ratio"] for row in found["plans"] if row["native"] == loop] for loop in (True, False))
        ratios, unseen = (f"{max(each) - 1:.1%}" for each in (native, swept)), found.get("unseen", ())
        tried = (f"{found[each]:,.0f}" for each in ("passes", "default"))
        lines.append([model, " / ".join(map(str, found["samples"])), " / ".join(tried),
                      " / ".join(f"{sweeps:.1f}" for sweeps in unseen), str(len(native)), *ratios])  # fmt: skip
    columns = (
        "model", "samples", "passes a sample", "sweeps of unseen ones", "plans compared", "slowest plan: longer by",
        "without the native loop",
    )  # fmt: skip
    return f"{table(columns, lines)}\n\n{measured_on(result['machine'])}"


def parts() -> dict[str, str]:
    """What the page shows of the result files, by its marks."""
    reports = {model: jf.Report.load(BUNDLED / model / "report.json") for model in MODELS}
    tried, under_guidance = _results("strategies"), _results("calibration-guided")
    return {
        "summary": summary(reports), "igm": igm(reports), "crm": crm(reports), "sweeps": sweeps(reports),
        "ranking": ranking(reports), "norms": norms(reports), "classes": classes(reports),
        "segments": segments(reports), "guided": guided(under_guidance), "strategies": strategies(tried),
        "agreement": agreement(reports, tried), "grid": grid(json.loads((RESULTS / "tuning-grid.json").read_text())),
        **{f"figure {number}": figure(number, reports) for number in FIGURES},
    }  # fmt: skip


def _results(name: str) -> dict[str, dict[str, Any]]:
    return {model: json.loads((RESULTS / f"{model}-{name}.json").read_text()) for model in MODELS}


def _starts() -> list[tuple[Start, float]]:
    """What sweeps are counted from, and to."""
    return [(start, tolerance) for start in ("images", "noise") for tolerance in TOLERANCES]


if __name__ == "__main__":
    fill(ROOT / "docs" / "calibration.md", parts())
