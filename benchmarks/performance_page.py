"""Puts results into docs/performance.md: `python benchmarks/performance_page.py`.

They are performance.json, growth.json, demo.json, demo-one.json, browser.json, regimes.json, loop-profile.json,
paper-sizes.json, gpu-counts.json, planning-at-size.json and, where there is one, gpu.json of docs/results. Also draws
error-against-time.png and regimes.png in docs/figures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gpu_page
import newcomer_page
import paper_sizes_page
import regimes_page
from filling import fill, measured_on, table
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jacobiflow.plots import sampler_style, save_png
from jacobiflow.plots.labels import Label, line_label, place_labels
from jacobiflow.plots.style import clear, new_figure, plain_ticks, styled

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
SAMPLERS = ("auto", "window", "GS-Jacobi", "Selective Jacobi Decoding", "STARFlow")
LOOPS = {"sequential": "--", "growing cache": "-."}
EAGER = "sequential, in PyTorch"
RATIO: dict[str, float] = {"1": 14, "4": 14, "16": 8, "64": 6.5}  # targets, over the growing cache
PASSES: dict[str, float] = {"1": 3.5, "4": 2.2, "16": 2.0, "64": 2.0}


def row(found: dict[str, Any], name: str) -> dict[str, Any]:
    """The row of a sampler in the final run of a batch size."""
    return next(entry for entry in found["rows"] if entry["strategy"] == name)


def headline(result: dict[str, Any]) -> str:
    """`auto` with its report and without, beside the targets, and its prediction beside what was measured."""
    lines = []
    for batch, found in result["final"].items():
        auto, bare, eager = (row(found, name) for name in ("auto, certified", "auto, without a report", EAGER))
        seconds, predicted = auto["seconds"]["median"], found["prediction"]["seconds"]
        ratios = (f"{each['speed_up']['growing cache']:.1f}x ({RATIO[batch]:g}x)" for each in (auto, bare))
        lines.append([
            batch, f"{row(found, 'growing cache')['seconds']['median']:.3f}", f"{eager['seconds']['median']:.3f}",
            f"{seconds:.3f}", *ratios,
            f"{seconds / found['encoding_pass']['median']:.2f} ({PASSES[batch]:g})",
            f"{eager['seconds']['median'] / seconds:.1f}x", f"{predicted:.3f} ({predicted / seconds - 1:+.0%})",
            f"{auto['error']['max']:.1e}", f"{bare['error']['max']:.1e}",
        ])  # fmt: skip
    return table(
        ["batch", "growing cache, s", f"{EAGER}, s", "`auto`, certified, s",
         "times as fast as the growing cache (target)", "without a report (target)", "encoding passes (target)",
         "times as fast as the loop in PyTorch", "predicted, s", "max error", "max error without a report"], lines,
    )  # fmt: skip


def peers(result: dict[str, Any]) -> str:
    """Every row of the final runs."""
    parts = []
    for batch, found in result["final"].items():
        lines = []
        for entry in sorted(found["rows"], key=lambda entry: entry["seconds"]["median"]):
            seconds, calls = entry["seconds"], entry["network_calls"]
            lines.append([
                entry["strategy"].replace(" | ", ": "), f"{seconds['median']:.3f}",
                f"{seconds['min']:.3f} to {seconds['max']:.3f}", f"{entry['speed_up']['growing cache']:.2f}x",
                f"{entry['speed_up']['sequential']:.2f}x", "" if calls is None else f"{calls:,}",
                f"{entry['error']['max']:.1e}",
            ])  # fmt: skip
        lines.append(["encoding pass", f"{found['encoding_pass']['median']:.3f}", "", "", "", "", ""])
        columns = [
            "sampler",
            "seconds",
            "least to most",
            "times as fast as the growing cache",
            "as sequential",
            "calls",
            "max error",
        ]
        parts.append(f"Batch {batch}:\n\n{table(columns, lines)}")
    return "\n\n".join(parts)


def without(result: dict[str, Any]) -> str:
    """`auto`, and `auto` without what peers lack: the plan, seconds, error."""
    lines = []
    for batch, found in result["final"].items():
        for entry in found["rows"]:
            if "plan" in entry and entry["strategy"] != "auto, certified":
                lines.append([
                    batch, entry["strategy"], made_of(entry["plan"]), f"{entry['seconds']['median']:.3f}",
                    f"{entry['speed_up']['growing cache']:.1f}x",
                    f"{row(found, EAGER)['seconds']['median'] / entry['seconds']['median']:.1f}x",
                    f"{entry['error']['max']:.1e}",
                ])  # fmt: skip
    return table(
        ["batch", "sampler", "plan", "seconds", "times as fast as the growing cache", "as the loop in PyTorch",
         "max error"], lines,
    )  # fmt: skip


def made_of(plan: dict[str, int]) -> str:
    """A plan in words: the loop of a block is that of the row, in native code or in PyTorch."""
    if not plan["swept"]:
        return "the loop"
    pieces = ", ".join(
        f"{word} in {plan[key]}" for key, word in (("bfloat16", "bfloat16"), ("fitted", "fitted")) if plan[key]
    )
    loop = f"the loop in {plan['loop']} block{'s' * (plan['loop'] > 1)}, " if plan["loop"] else ""
    return f"{loop}sweeps in {plan['swept']}" + (f" ({pieces})" if pieces else "")


def tough(result: dict[str, Any]) -> str:
    """Block 7 by its best windows, plain and with guess and chord."""
    lines = []
    for batch, rows in result["tough"].items():
        best = {
            kind: min((entry for entry in rows if entry["solver"].startswith(kind)), key=lambda entry: entry["seconds"])
            for kind in ("plain", "chord", "sequential")
        }
        saved = 1 - best["chord"]["seconds"] / best["plain"]["seconds"]
        cells = [
            f"{entry['solver'].split()[-1]}: {entry['seconds'] * 1e3:.1f} ms, {entry['mean_sweeps']:.1f} sweeps"
            for entry in (best["plain"], best["chord"])
        ]
        lines.append([batch, *cells, f"{saved:.0%}", f"{best['sequential']['seconds'] * 1e3:.1f} ms"])
    return table(["batch", "best plain window", "best window with guess and chord", "saved", "sequential"], lines)


def counts(result: dict[str, Any]) -> str:
    """Calls and work to 1e-2, of the window of block 7 with the fewest calls."""
    lines = []
    for batch, rows in result["counts"].items():
        for kind in ("plain", "tuned"):
            for entry in (entry for entry in rows if entry["kind"] == kind):
                lines.append([
                    batch, "guess and chord" if kind == "tuned" else "plain", str(entry["tough_window"]),
                    str(entry["network_calls"]), f"1/{entry['calls_of_sequential']:.0f}",
                    f"{entry['evaluations_per_token']:.2f}", f"{entry['max_error']:.1e}",
                ])  # fmt: skip
    columns = [
        "batch",
        "sweeps",
        "window in block 7",
        "calls",
        "of sequential's",
        "evaluations of a token",
        "max error",
    ]
    return table(columns, lines)


def guided(result: dict[str, Any]) -> str:
    """`auto` and the baselines under guidance."""
    lines = []
    for batch, found in result["guided"].items():
        cells = [batch]
        for name in ("growing cache", EAGER, "sequential", "jacobi", "auto, certified"):
            entry = row(found, name)
            target = f", target {RATIO[batch]:g}x" if name == "auto, certified" else ""
            ratio = "" if name == "growing cache" else f" ({entry['speed_up']['growing cache']:.1f}x{target})"
            cells.append(f"{entry['seconds']['median']:.3f} s{ratio}")
        lines.append([*cells, f"{row(found, 'auto')['error']['max']:.1e}"])
    return table(
        ["batch", "growing cache", EAGER, "sequential", "jacobi", "auto, certified", "max error of auto"], lines
    )


def profile(result: dict[str, Any]) -> str:
    """Where the seconds go."""
    lines = []
    for batch, found in result["profile"].items():
        for name, kinds in found.items():
            if name != "gigaflops_of_products":
                lines.append([batch, name, *(f"{seconds:.3f}" for seconds in kinds.values())])
    kinds = next(iter(next(iter(result["profile"].values())).values()))
    rates = "; ".join(
        f"batch {batch} {found['gigaflops_of_products']['float32']:.0f} and "
        f"{found['gigaflops_of_products']['bfloat16']:.0f}"
        for batch, found in result["profile"].items()
    )
    return (
        f"{table(['batch', 'sampler', *kinds], lines)}\n\nGFLOP/s of the perceptron's first product over a whole "
        f"batch, float32 and bfloat16: {rates}."
    )


def compiled(result: dict[str, Any]) -> str:
    """A sweep of all tokens of one block, as it is and compiled."""
    lines = [
        [batch, dtype, *(f"{timing[kind] * 1e3:.2f} ms" for kind in ("as it is", "compiled")),
         f"{timing['compiling']:.0f} s"]
        for batch, found in result["compiled"].items()
        for dtype, timing in found.items()
    ]  # fmt: skip
    return table(["batch", "network", "as it is", "compiled", "compiling"], lines)


def growth(result: dict[str, Any]) -> str:
    """The exponents fitted to tokens, batch and tolerance, by sampler."""
    lines = []
    for by in ("tokens", "batch", "tolerance"):
        for sampler, fitted in result[f"by_{by}"]["exponents"].items():
            measures = ("network_calls", "evaluations_per_token", "seconds")
            lines.append([by, sampler, *(f"{fitted[name]:.2f}" if name in fitted else "" for name in measures)])
    return table(["by", "sampler", "network calls", "evaluations of a token", "seconds"], lines)


@styled
def figure(result: dict[str, Any]) -> Figure:
    """Error against time, a panel per batch: of each sampler the settings that none of its own beats in both."""
    drawn = new_figure(7.4)
    panels = drawn.subplots(-(-len(result["grid"]) // 2), 2, sharey=True, squeeze=False).ravel()
    for axis, (batch, rows) in zip(panels, result["grid"].items(), strict=True):
        _panel(axis, rows, {name: row(result["final"][batch], name)["seconds"]["median"] for name in LOOPS})
        axis.set_title(f"batch {batch}")
    drawn.supxlabel("seconds for the batch")
    drawn.supylabel("largest error of an entry")
    for axis in panels:  # once all is drawn: the layout is the last to move it
        lines = {str(line.get_label()): line for line in axis.get_lines()}
        loops = [(name, float(lines[name].get_xdata()[0])) for name in LOOPS]
        heights = [10.0**power for power in range(-6, 1)]
        place_labels(axis, [
            *(line_label(lines[name]) for name in SAMPLERS),
            *(Label(name, [(x, y) for y in heights], sampler_style(name).color) for name, x in loops),
        ])  # fmt: skip
    return drawn


def _panel(axis: Axes, rows: Sequence[dict[str, Any]], loops: Mapping[str, float]) -> None:
    """A line for each sampler, and vertical ones at the seconds of the exact loops."""
    for sampler in SAMPLERS:
        own = sorted((entry for entry in rows if entry["sampler"] == sampler), key=lambda entry: entry["seconds"])
        front: list[dict[str, Any]] = []
        for entry in own:
            if not front or entry["max_error"] < front[-1]["max_error"]:
                front.append(entry)
        points = [(entry["seconds"], max(entry["max_error"], 1e-6)) for entry in front]
        style = sampler_style(sampler)
        axis.plot(*zip(*points, strict=True), color=style.color, marker=style.marker, label=sampler)
    for name, line in LOOPS.items():
        axis.axvline(loops[name], color=sampler_style(name).color, linestyle=line, linewidth=1.2, label=name)
    axis.set(xscale="log", yscale="log", ylim=(4e-7, 10))
    axis.margins(x=0.1)
    plain_ticks(axis.xaxis)
    clear(axis)


def load(name: str) -> dict[str, Any]:
    """A result file."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def parts() -> dict[str, str]:
    """What the page shows of the result files, by its marks."""
    result = load("performance")
    found = {"machine": measured_on(result["machine"])}
    for part in (headline, peers, without, tough, counts, guided, profile, compiled):
        found[part.__name__] = part(result)
    found["growth"] = growth(load("growth"))
    demos = "\n\n".join(newcomer_page.demo(load(name)) for name in ("demo", "demo-one"))
    found |= {"demo": demos, "browser": newcomer_page.browser(load("browser"))}
    found |= regimes_page.parts(load("regimes"), load("loop-profile"))
    return found | paper_sizes_page.parts(load("paper-sizes")) | _gpu()


def _gpu() -> dict[str, str]:
    found = load("gpu") if (RESULTS / "gpu.json").exists() else None
    return gpu_page.parts(load("gpu-counts"), load("planning-at-size"), found)


def main() -> None:
    """Fill the page, draw the figures."""
    fill(ROOT / "docs" / "performance.md", parts())
    figures = ROOT / "docs" / "figures"
    save_png(figure(load("performance")), figures / "error-against-time.png")
    save_png(regimes_page.figure(load("regimes")), figures / "regimes.png")


if __name__ == "__main__":
    main()
