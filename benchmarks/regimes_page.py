"""What docs/performance.md shows of regimes.json and loop-profile.json; `performance_page.py` puts it there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from filling import measured_on, table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from regimes import EAGER, FUSED, LOW, PASS

import jacobiflow as jf
from jacobiflow.plots import sampler_style
from jacobiflow.plots.labels import line_label, place_labels
from jacobiflow.plots.style import clear, new_figure, plain_ticks, readable, styled

EVALUATIONS = (3, 5, 10)
LOOPS = {FUSED: sampler_style("sequential"), EAGER: replace(sampler_style("sequential"), filled=False)}
SWEEPS = sampler_style("jacobi").color
MODEL = sampler_style("auto").color  # of trained models


def seconds_of(run: Mapping[str, Any]) -> dict[str, float]:
    """The least of the rounds, by way."""
    return {name: timing["min"] for name, timing in run["seconds"].items()}


def in_passes(run: dict[str, Any], name: str) -> float:
    """A way's seconds in units of an encoding pass in float32."""
    seconds = seconds_of(run)
    return seconds[name] / seconds[PASS]


def best_loop(run: dict[str, Any]) -> str:
    """The faster exact loop."""
    return min((FUSED, EAGER), key=seconds_of(run).__getitem__)


def regimes(result: dict[str, Any]) -> str:
    """A row for every shape and batch size."""
    lines = []
    for run in sorted(result["runs"], key=lambda run: (run["trained"], run["weights_mb"], run["batch_size"])):
        seconds, best = seconds_of(run), best_loop(run)
        name = f"{run['channels']} x {run['layers']}" + (f", {run['name']}" if run["trained"] else "")
        lines.append([
            name, f"{run['tokens']} x {run['values']}", f"{run['weights_mb']:.1f} MB", str(run["batch_size"]),
            *(f"{seconds[way] * 1e3:.1f}" for way in (PASS, LOW)),
            *(f"{seconds[way] * 1e3:,.1f} ({in_passes(run, way):.1f})" for way in (FUSED, EAGER)),
            f"{in_passes(run, best):.1f}", f"{seconds[best] / seconds[LOW]:.1f}",
        ])  # fmt: skip
    columns = [
        "channels x layers", "T x C", "weights of a block", "batch", "pass, ms", "in bfloat16",
        "fused loop, ms (passes)", "eager loop, ms (passes)", "sweeps win below", "in bfloat16 below",
    ]  # fmt: skip
    return table(columns, lines)


def summary(result: dict[str, Any]) -> str:
    """What the table comes to."""
    runs = [run for run in result["runs"] if not run["trained"]]
    lines = []
    for batch in sorted({run["batch_size"] for run in runs}):
        own = sorted((run for run in runs if run["batch_size"] == batch), key=lambda run: run["weights_mb"])
        first, last = own[0], own[-1]
        won = {k: _shapes(run for run in own if in_passes(run, best_loop(run)) > k) for k in EVALUATIONS}
        lines.append(
            f"- Batch {batch}: the fused loop takes {in_passes(first, FUSED):.1f} passes at {first['name']}, and "
            f"{in_passes(last, FUSED):.1f} at {last['name']}. Sweeps in float32 win at "
            + ("; ".join(f"{where} with {k} evaluations of a token" for k, where in won.items() if where) or "no shape")
            + "."
        )
    slower = _shapes((run for run in result["runs"] if best_loop(run) == EAGER), batch=True) or "no shape"
    largest = max(run["max_difference"] for run in result["runs"])
    lines.append(
        f"- The fused loop is slower than the eager one at {slower}. Their answers differ by at most {largest:.0e}."
    )
    papers = [megabytes_of(preset.config) for preset in jf.PRESETS.values()]
    lines.append(f"- A block of the GS-Jacobi paper's models has {min(papers):.0f} to {max(papers):.0f} MB of weights.")
    return "\n".join(lines)


def megabytes_of(config: jf.TarFlowConfig) -> float:
    """The weights of a block, which are not made."""
    with torch.device("meta"):
        flow = jf.TarFlow(replace(config, num_blocks=1))
    return sum(parameter.nbytes for parameter in flow.blocks[0].parameters()) / 1e6


def _shapes(runs: Iterable[dict[str, Any]], batch: bool = False) -> str:
    names = [run["name"] + (f" and batch {run['batch_size']}" if batch else "") for run in runs]
    return ", ".join(names)


def loop_profile(result: dict[str, Any]) -> str:
    """Milliseconds of the pieces of the loop, and of those that an encoding pass has too."""
    lines = []
    names = list(result["rows"][0]["pieces"])
    for row in result["rows"]:
        for title, found, total in (
            ("fused loop", row["pieces"], row["with_clocks"]),
            ("encoding pass", row["pass"], row["pass"]["all"]),
        ):
            rate = 2 * row["multiplications"] / found["dense layers"] / 1e9
            cells = (f"{found[name] * 1e3:.2f} ({found[name] / total:.0%})" if name in found else "" for name in names)
            lines.append([str(row["batch_size"]), title, f"{total * 1e3:.1f}", *cells, f"{rate:.0f}"])
    clocks = ", ".join(f"{row['with_clocks'] / row['loop']:.2f}" for row in result["rows"])
    columns = ["batch", "", "all, ms", *names, "GFLOP/s of the dense layers"]
    return f"{table(columns, lines)}\n\nWith clocks over without, by batch size: {clocks}."


def builds(result: dict[str, Any]) -> str:
    """Milliseconds of the loop as it is compiled for other processors."""
    names = list(result["rows"][0]["builds"])
    lines = [
        [str(row["batch_size"]), f"{row['loop'] * 1e3:.1f}",
         *(f"{row['builds'][name] * 1e3:.1f} ({row['builds'][name] / row['loop']:.1f}x)" for name in names)]
        for row in result["rows"]
    ]  # fmt: skip
    return table(["batch", "this processor, ms", *names], lines)


def parts(found: dict[str, Any], profiled: dict[str, Any]) -> dict[str, str]:
    """The page's parts, by their marks, from the two result files."""
    return {
        "regimes": f"{measured_on(found['machine'])}\n\n{regimes(found)}",
        "regimes summary": summary(found),
        "builds": builds(profiled),
        "loop profile": f"{measured_on(profiled['machine'])}\n\n{loop_profile(profiled)}",
    }


@styled
def figure(result: dict[str, Any]) -> Figure:
    """Exact loops in encoding passes against the weights of a block, a panel for each batch size."""
    batches = sorted({run["batch_size"] for run in result["runs"]})
    drawn = new_figure(0.6 + 3.6 * -(-len(batches) // 2))
    panels = drawn.subplots(-(-len(batches) // 2), 2, sharex=True, sharey=True, squeeze=False).ravel()
    sizes = [run["weights_mb"] for run in result["runs"]]
    values = [in_passes(run, way) for run in result["runs"] for way in (FUSED, EAGER)]
    for axis in panels[len(batches) :]:
        axis.set_visible(False)
    for axis, batch in zip(panels, batches, strict=False):
        own = [run for run in result["runs"] if run["batch_size"] == batch]
        _panel(axis, sorted((run for run in own if not run["trained"]), key=lambda run: run["weights_mb"]))
        axis.set(xscale="log", yscale="log", ylim=(0.17 * min(1, *values), 1.3 * max(10, *values)))
        axis.set_xlim(min(sizes) / 5, max(sizes) * 14)  # room for numbers; names have it below
        axis.set_title(f"batch {batch}")
        plain_ticks(axis.xaxis, (1,))
        plain_ticks(axis.yaxis, (1, 3))
        axis.tick_params(labelbottom=True)
        clear(axis)
    drawn.supxlabel("weights of a block, MB")
    drawn.supylabel("time of a block's inverse, in encoding passes of float32")
    shown = {name: line for line, name in zip(*panels[0].get_legend_handles_labels(), strict=True) if name not in LOOPS}
    drawn.legend(list(shown.values()), list(shown), loc="outside upper center", ncols=2)
    for axis, batch in zip(panels, batches, strict=False):
        _names(axis, [run for run in result["runs"] if run["batch_size"] == batch and run["trained"]])
    return drawn


def _panel(axis: Axes, runs: Sequence[dict[str, Any]]) -> None:
    """The loops over random weights, and what sweeps take at the least; where these take less is shaded."""
    sizes = [run["weights_mb"] for run in runs]
    exact = [in_passes(run, best_loop(run)) for run in runs]
    for way, style in LOOPS.items():
        times = [in_passes(run, way) for run in runs]
        axis.plot(
            sizes, times, color=style.color, marker=style.marker, fillstyle=style.fillstyle,
            linestyle="-" if style.filled else "--", label=way, zorder=3,
        )  # fmt: skip
    for k in EVALUATIONS:
        axis.fill_between(
            sizes, k, exact, where=[time > k for time in exact], interpolate=True, color=SWEEPS, alpha=0.3,
            linewidth=0, label="sweeps in float32 beat both loops" if k == EVALUATIONS[0] else None,
        )  # fmt: skip
        for way, name, line, right in ((PASS, "float32", "-", 26), (LOW, "bfloat16", ":", 4)):
            times = [k * in_passes(run, way) for run in runs]
            axis.plot(
                sizes, times, color=SWEEPS, linestyle=line, linewidth=1.4,
                label=f"k evaluations of a token, {name}" if k == EVALUATIONS[0] else None,
            )  # fmt: skip
            axis.annotate(
                f"k = {k}" if way == PASS else str(k), (sizes[-1], times[-1]), xytext=(right, 0),
                textcoords="offset points", color=readable(SWEEPS), va="center",
            )  # fmt: skip


def _names(axis: Axes, runs: Sequence[dict[str, Any]]) -> None:
    """The loops in trained models, each model's name below its own at the foot of the panel, and the loops' names."""
    loops = [line for line in axis.get_lines() if line.get_label() in LOOPS]
    for run in runs:
        places = [(run["weights_mb"], in_passes(run, way)) for way in LOOPS]
        axis.plot(*zip(*places, strict=True), color=MODEL, linewidth=1, zorder=4)
        for place, style in zip(places, LOOPS.values(), strict=True):
            axis.plot(
                *place, marker="*", markersize=12, color=MODEL if style.filled else "white",
                markeredgecolor="white" if style.filled else MODEL, linestyle="", zorder=5,
            )  # fmt: skip
        axis.annotate(
            run["name"], (run["weights_mb"], 0.02), xycoords=axis.get_xaxis_transform(), rotation="vertical",
            ha="center", va="bottom", color=readable(MODEL),
        )  # fmt: skip
    place_labels(axis, [line_label(line) for line in loops])
