"""Puts the figures of docs/results into docs/flows.md, between its marks: `python benchmarks/flows_page.py`.

It draws docs/figures/masked-flows.png too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calibration_page import crm, igm
from filling import fill, measured_on, table
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import jacobiflow as jf
from jacobiflow.plots import save_png
from jacobiflow.plots.style import ORDERED, clear, new_figure, plain_ticks, styled

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
REPORT = ROOT / "src" / "jacobiflow" / "models" / "digits-maf" / "report.json"
PAPER = (  # method, seconds, ratio, MAE
    ("For loop", 4903, 1.0, "0.000"),
    ("10 sweeps", 563, 8.73, "0.043"),
    ("20 sweeps", 772, 6.35, "0.019"),
    ("30 sweeps", 1114, 4.40, "0.007"),
)
WIDE = 784
SHOWN = (("slow", 10_000), ("slow", 100), ("fast", 10_000))  # the columns of the tables: direction and rows
ERROR_ROWS = 100
CALLS = {"sampling": "inverse", "density": "`log_prob`"}
MARKERS = {1: "o", 100: "^", 10_000: "s", 1_000_000: "D"}  # by rows
READ = "Speed-up over the library, and in brackets the time of the accelerated call"
FIGURE_WIDTH = 5.2  # inches: the figure is read on a telephone too


def speed_up(ratio: float) -> str:
    """A ratio as the tables show it."""
    return f"{ratio:.0f}x" if ratio >= 9.95 else f"{ratio:.1f}x"


def duration(seconds: float) -> str:
    """Seconds, or milliseconds."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.{2 if seconds < 1e-3 else 1}f} ms"


def cell(run: Mapping[str, Any] | None) -> str:
    """A run as the tables show it."""
    if run is None:
        return "-"
    return f"{speed_up(run['speed_up'])} ({duration(run['seconds']['accelerated']['median'])})"


def small(result: dict[str, Any], of_zuko: bool) -> dict[tuple[str, str, int], dict[tuple[str, int], dict[str, Any]]]:
    """The runs of all but the widest flows, by library, flow and features, then by direction and rows."""
    found: dict[tuple[str, str, int], dict[tuple[str, int], dict[str, Any]]] = {}
    for run in result["runs"]:
        if run["features"] < WIDE and (run["library"] == "zuko") == of_zuko:
            own = found.setdefault((run["library"], run["flow"], run["features"]), {})
            own[run["direction"], run["rows"]] = run
    return found


def zuko(result: dict[str, Any]) -> str:
    """Speed-ups of zuko's flows."""
    columns = [
        "zuko, 5 transforms, hidden 50 x 2", "inverse, 10,000 rows", "inverse, 100 rows",
        "`log_prob` without gradients, 10,000 rows",
    ]  # fmt: skip
    lines = [
        [f"{flow}, D = {features}", *(cell(runs.get(shown)) for shown in SHOWN)]
        for (_, flow, features), runs in small(result, of_zuko=True).items()
    ]
    return f"{READ}. {measured_on(result['machine'])}\n\n{table(columns, lines)}"


def libraries(result: dict[str, Any]) -> str:
    """Speed-ups of the flows of the other libraries."""
    columns = [
        "5 transforms, hidden 50 x 2", "slow direction", "10,000 rows", "100 rows", "fast direction", "10,000 rows",
    ]  # fmt: skip
    lines = []
    for (library, flow, features), runs in small(result, of_zuko=False).items():
        calls = {direction: CALLS[run["call"]] for (direction, _), run in runs.items()}
        slow, few, fast = (cell(runs.get(shown)) for shown in SHOWN)
        lines.append([f"{library} {flow}, D = {features}", calls["slow"], slow, few, calls["fast"], fast])
    return f"{READ}. {versions(result)}\n\n{table(columns, lines)}"


def versions(result: dict[str, Any]) -> str:
    """The libraries, in a sentence."""
    found = dict.fromkeys(f"{run['library']} {run['version']}" for run in result["runs"])
    return f"Versions: {', '.join(found)}."


def wide(result: dict[str, Any]) -> str:
    """Flows of 784 features."""
    columns = ["D = 784, 5 transforms, hidden 512 x 2", "rows", "", "library", "accelerated", "speed-up"]
    lines = [
        [
            f"{run['library']} {run['flow']}", str(run["rows"]), CALLS[run["call"]],
            *(duration(run["seconds"][name]["median"]) for name in ("library", "accelerated")),
            speed_up(run["speed_up"]),
        ]
        for run in result["runs"] if run["features"] == WIDE
    ]  # fmt: skip
    return table(columns, lines)


def errors(result: dict[str, Any]) -> str:
    """Errors against float64, of each flow the number of features with the largest ratio."""
    runs = [run for run in result["runs"] if run["rows"] == ERROR_ROWS and "error" in run]
    lines = []
    for library, flow, direction in dict.fromkeys((r["library"], r["flow"], r["direction"]) for r in runs):
        own = [r for r in runs if (r["library"], r["flow"], r["direction"]) == (library, flow, direction)]
        worst = max(own, key=_ratio)
        errors = (f"{worst['error'][name]:.1e}" for name in ("library", "accelerated"))
        name = f"{library} {flow}, {CALLS[worst['call']]}"
        lines.append([name, *errors, f"{_ratio(worst):.2f}", str(worst["features"])])
    columns = ["", "library", "accelerated", "ratio", "D"]
    return (
        f"Root mean square error of {ERROR_ROWS} rows against the same flow in float64, at the number of features with "
        f"the largest ratio to the library's own error.\n\n{table(columns, lines)}"
    )


def _ratio(run: Mapping[str, Any]) -> float:
    """The error of the accelerated call over the library's."""
    return float(run["error"]["accelerated"] / run["error"]["library"])


def sbi(result: dict[str, Any]) -> str:
    """sbi's posteriors from end to end."""
    lines = [
        [
            f"{run['method']}, `{run['estimator']}`", run["call"],
            *(f"{duration(run['seconds'][name]['median'])} ({run['share'][name]:.0%})" for name in run["share"]),
            speed_up(run["speed_up"]),
        ]
        for run in result["runs"]
    ]  # fmt: skip
    columns = ["estimator", "call", "sbi (share of the flow)", "accelerated (share of the flow)", "speed-up"]
    return f"sbi {result['runs'][0]['version']}. {measured_on(result['machine'])}\n\n{table(columns, lines)}"


def maf(result: dict[str, Any]) -> str:
    """Table 5 of the paper."""
    count, batch, first, machine = result["images"], result["batch_size"], result["rows"][0], result["machine"]
    lines = [
        f"Table 5 of the paper, on {count:,} images of Fashion-MNIST in batches of {batch}: seconds to invert their "
        f"latents, and the mean absolute error of a pixel in [0, 1]. On {machine['cores']} cores of "
        f"{machine['processor']}; the time in italics is extrapolated from {first['batches']} batches, which took "
        f"times within {first['spread'] - 1:.0%} of each other:\n",
        "| method | seconds | speed-up | MAE | largest error |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(f"| paper: {name} | {taken:,} | {ratio:.2f}x | {mae} | |" for name, taken, ratio, mae in PAPER),
    ]
    for row in result["rows"]:
        seconds = row["seconds_of_all"]
        text = f"{seconds:.3g}" if seconds < 100 else f"{seconds:,.0f}"
        shown = text if row["batches"] * batch == count else f"*{text}*"
        ratio = first["seconds_of_all"] / seconds
        lines.append(f"| {row['method']} | {shown} | {ratio:.1f}x | {row['mae']:.1e} | {row['max_error']:.1e} |")
    return "\n".join(lines)


@styled
def figure(result: dict[str, Any]) -> Figure:
    """Speed-ups of zuko's flows against features, a panel for a flow and a direction, a line for a number of rows."""
    drawn = new_figure(5.4)
    drawn.set_figwidth(FIGURE_WIDTH)
    panels = drawn.subplots(2, 2, sharex=True, sharey=True)
    for column, flow in zip(panels.T, ("MAF", "NSF"), strict=True):
        for axis, (direction, text) in zip(column, (("slow", "inverse"), ("fast", "log_prob")), strict=True):
            _panel(axis, [run for run in result["runs"]
                          if (run["library"], run["flow"], run["direction"]) == ("zuko", flow, direction)])  # fmt: skip
            axis.set_title(f"{flow}, {text}")
    drawn.supxlabel("features")
    drawn.supylabel("speed-up over zuko")
    drawn.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return drawn


def _panel(axis: Axes, runs: list[dict[str, Any]]) -> None:
    """Lines from dark, of one row, to light."""
    for place, (rows, marker) in enumerate(MARKERS.items()):
        points = [(run["features"], run["speed_up"]) for run in runs if run["rows"] == rows and run["features"] < WIDE]
        color = ORDERED(0.9 * place / (len(MARKERS) - 1))
        axis.plot(*zip(*points, strict=True), color=color, marker=marker, label=f"{rows:,} row{'s' * (rows > 1)}")
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set(xscale="log", yscale="log")
    plain_ticks(axis.yaxis, (1,))
    axis.set_xticks([2, 5, 10, 20, 64], ["2", "5", "10", "20", "64"])
    axis.minorticks_off()
    clear(axis)


def load(name: str) -> dict[str, Any]:
    """A result file."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def parts() -> dict[str, str]:
    """What the page shows of the result files, by its marks."""
    masked = load("masked-flows")
    report = {"digits-maf": jf.Report.load(REPORT)}
    return {part.__name__: part(masked) for part in (zuko, libraries, wide, errors)} | {
        "sbi": sbi(load("sbi")), "maf": maf(load("maf")), "igm": igm(report), "crm": crm(report),
    }  # fmt: skip


if __name__ == "__main__":
    fill(ROOT / "docs" / "flows.md", parts())
    save_png(figure(load("masked-flows")), ROOT / "docs" / "figures" / "masked-flows.png")
