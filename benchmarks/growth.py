"""How calls, work and time grow with tokens, batch and tolerance: `python benchmarks/growth.py`.

Writes docs/results/growth.json and docs/figures/growth.png. It first trains three small models of the same images, of
49, 196 and 784 tokens (patches of 4, 2 and 1 pixels), in out/growth, which takes about an hour on two cores and goes on
where it stopped; then it needs an otherwise idle machine and about 15 minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from performance import draw, latents

import jacobiflow as jf
from jacobiflow.baselines import GROWING_CACHE, SEQUENTIAL
from jacobiflow.experiments.speed import Comparison, compare
from jacobiflow.files import write_json
from jacobiflow.measuring import machine
from jacobiflow.memory import keep_freed_memory
from jacobiflow.plots import sampler_style, save_png
from jacobiflow.plots.labels import line_label, place_labels
from jacobiflow.plots.style import clear, new_figure, plain_ticks, styled
from jacobiflow.strategy import auto

ROOT = Path(__file__).resolve().parent.parent
RESULTS, FIGURES = ROOT / "docs" / "results", ROOT / "docs" / "figures"
PATCHES = (4, 2, 1)
STEPS = 1000
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
BATCH = 4
MEASURES = {"network_calls": "network calls", "evaluations_per_token": "evaluations of a token", "seconds": "seconds"}


def train(folder: Path) -> dict[int, Path]:
    """The model folders by patch size, trained where they are not yet."""
    folders = {}
    for patch in PATCHES:
        folders[patch] = folder / f"patch{patch}"
        shape = f"--patch-size {patch} --channels 64 --blocks 4 --layers 2 --head-dim 32"
        options = f"--images fashion-mnist {shape} --steps {STEPS} --batch-size 32 --sample-every {STEPS}"
        subprocess.run(
            [sys.executable, "-m", "jacobiflow", "train", *options.split(), "--out", str(folders[patch])], check=True
        )
    return folders


def rows(found: Comparison, **at: float) -> list[dict[str, Any]]:
    """What is plotted, of each sampler."""
    return [
        at | {
            "sampler": row.strategy, "seconds": row.seconds.median, "max_error": row.error.max,
            "network_calls": row.network_calls, "evaluations_per_token": row.evaluations_per_token,
        }
        for row in found.rows
    ]  # fmt: skip


def by_tokens(folders: dict[int, Path]) -> list[dict[str, Any]]:
    """A plan and plain sweeps to 1e-3, by the number of tokens. The plans are by tunings of 8 latents."""
    found = []
    for folder in folders.values():
        flow = jf.TarFlow.from_pretrained(folder).requires_grad_(False)
        z, labels = latents(flow, BATCH)
        runs: dict[str, Callable[[], jf.Samples]] = {
            name: partial(draw, flow, z, labels, name) for name in ("jacobi", "window:32")
        }
        runs["auto"] = partial(draw, flow, z, labels, jf.plan(flow, jf.tune(flow, samples=8), BATCH))
        found += rows(compare(flow, z, labels, runs, repeats=3), tokens=flow.config.num_tokens)
        print(f"{flow.config.num_tokens} tokens done", flush=True)
    return found


def by_batch(flow: jf.TarFlow) -> list[dict[str, Any]]:
    """`auto` and plain sweeps by batch size."""
    found = []
    for batch in BATCHES:
        z, labels = latents(flow, batch)
        runs: dict[str, Callable[[], jf.Samples]] = {
            "auto": partial(draw, flow, z, labels, auto(flow, batch)),
            "jacobi": partial(draw, flow, z, labels, "jacobi"),
            "window:32": partial(draw, flow, z, labels, "window:32"),
        }
        found += rows(compare(flow, z, labels, runs, repeats=5 if batch < 32 else 1), batch=batch)
        print(f"batch {batch} done", flush=True)
    return found


def by_tolerance(flow: jf.TarFlow) -> list[dict[str, Any]]:
    """`auto` and plain sweeps by tolerance."""
    z, labels = latents(flow, BATCH)
    found = []
    for tolerance in TOLERANCES:
        runs: dict[str, Callable[[], jf.Samples]] = {
            name: partial(
                jf.sample, flow, latents=z, labels=labels, strategy=name, tolerance=tolerance, certify=False,
                progress=False,
            )
            for name in ("jacobi", "window:32")
        }  # fmt: skip
        runs["auto"] = partial(draw, flow, z, labels, auto(flow, BATCH, tolerance))
        found += rows(compare(flow, z, labels, runs, repeats=5), tolerance=tolerance)
        print(f"tolerance {tolerance:g} done", flush=True)
    return found


def exponents(found: Sequence[dict[str, Any]], by: str) -> dict[str, dict[str, float]]:
    """The p of y = c x^p, fitted by least squares of logarithms, by sampler and measure."""
    fitted: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(row["sampler"] for row in found):
        own = [row for row in found if row["sampler"] == name]
        fitted[name] = {
            measure: float(np.polyfit(np.log([row[by] for row in own]), np.log([row[measure] for row in own]), 1)[0])
            for measure in MEASURES
            if all(row[measure] is not None for row in own)
        }
    return fitted


@styled
def figure(result: dict[str, Any]) -> Figure:
    """A row of panels for each of tokens, batch and tolerance; a column for each measure; both axes logarithmic."""
    drawn = new_figure(8.4)
    panels = drawn.subplots(3, 3)
    for line, by in zip(panels, ("tokens", "batch", "tolerance"), strict=True):
        found = result[f"by_{by}"]["rows"]
        for axis, measure in zip(line, MEASURES, strict=True):
            _panel(axis, found, by, measure)
    for axis, name in zip(panels[0], MEASURES.values(), strict=True):
        axis.set_title(name)
    for axis in panels.ravel():
        place_labels(axis, [line_label(line) for line in axis.get_lines()])
    return drawn


def _panel(axis: Axes, found: Sequence[dict[str, Any]], by: str, measure: str) -> None:
    for name in (GROWING_CACHE, SEQUENTIAL, "jacobi", "window:32", "auto"):
        points = [(row[by], row[measure]) for row in found if row["sampler"] == name and row[measure] is not None]
        if points:
            style = sampler_style(name)
            axis.plot(*zip(*points, strict=True), color=style.color, marker=style.marker, label=name)
    axis.set(xscale="log", yscale="log", xlabel=by if by != "batch" else "batch size")
    plain_ticks(axis.yaxis)
    values = sorted({row[by] for row in found})
    shown = values[::2] if len(values) > 4 else values
    axis.set_xticks(shown, [f"{value:g}" for value in shown])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.margins(x=0.08, y=0.18)
    if by == "tolerance":
        axis.invert_xaxis()
    clear(axis)


def main() -> None:
    """Train, measure, fit, draw; what the result file already has is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT / "out" / "growth")
    arguments = parser.parse_args()
    path, flow = RESULTS / "growth.json", jf.TarFlow.from_pretrained("fashion-p2").requires_grad_(False)
    head = {"command": "python benchmarks/growth.py", "machine": machine(), "batch": BATCH}
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    result = result if result.get("machine") == head["machine"] else head
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "tokens": lambda: by_tokens(train(arguments.models)),
        "batch": lambda: by_batch(flow),
        "tolerance": lambda: by_tolerance(flow),
    }
    for by, measure in parts.items():
        if f"by_{by}" not in result:
            found = measure()
            result[f"by_{by}"] = {"rows": found, "exponents": exponents(found, by)}
            write_json(path, result)
    save_png(figure(result), FIGURES / "growth.png")


if __name__ == "__main__":
    keep_freed_memory()  # for all that is compared
    main()
