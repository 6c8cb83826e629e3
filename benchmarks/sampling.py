"""Times every way to sample from `fashion-p2` in one interleaved run: `python benchmarks/sampling.py`.

Writes docs/results/sampling.json and .md and the table in docs/benchmarks.md. Needs an otherwise idle machine and
about 10 minutes on two cores. The baseline is the original sampler's growing-cache loop.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import jacobiflow as jf
from jacobiflow.benchmarking import ENCODING_PASS, GROWING_CACHE, Row, compare, machine, paired_error
from jacobiflow.files import write_atomically, write_json
from jacobiflow.latents import draw_latents

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
BATCHES = (1, 4, 16, 64)
REPEATS = {1: 7, 4: 5, 16: 3, 64: 2}
GUIDANCE = jf.Guidance(1.0)
ERROR_BOUND = 1e-2
TOUGH = 7
# The paper's kind of setting: the fastest of these whose error at batch 4 is below the bound.
PAPER_GRID = [f"[{TOUGH}-{gs}-{j}-{rest}]" for gs in (7, 14, 28) for j in (5, 7, 10, 14) for rest in (8, 11)]


def window_strategy(flow: jf.TarFlow, size: int, rest: jf.Solver, tolerance: float) -> jf.Strategy:
    """A window on the tough block, `rest` on the others."""
    solvers = [rest] * flow.config.num_blocks
    solvers[TOUGH] = jf.Solver(jf.Window(size), stopping=jf.Tolerance(tolerance))
    return jf.Strategy(tuple(solvers))


def methods(flow: jf.TarFlow, paper: str) -> dict[str, str | jf.Strategy]:
    """What is compared, beside the two baselines and the encoding pass."""
    tolerance = jf.Tolerance(1e-3)
    return {
        f"GS-Jacobi {paper}": paper,
        "jacobi": "jacobi",
        "auto": "auto",
        "window 24, whole elsewhere": window_strategy(flow, 24, jf.Solver(jf.Whole(), stopping=tolerance), 1e-3),
    }


def choose_paper_setting(flow: jf.TarFlow, guidance: jf.Guidance | None) -> tuple[str, list[dict[str, Any]]]:
    """The fastest setting of PAPER_GRID at an error below the bound, and what all of them gave."""
    z, labels = latents(flow, 4)
    exact = draw(flow, z, labels, "sequential", guidance).images
    rows: list[dict[str, Any]] = []
    for setting in PAPER_GRID:
        result = draw(flow, z, labels, setting, guidance)
        error = paired_error(result.images, exact).max
        rows.append({"setting": setting, "error": error, "calls": result.network_calls, "seconds": result.seconds})
        print(f"  {setting}: error {error:.1e}, {result.network_calls} calls, {result.seconds:.2f} s", flush=True)
    good = [row for row in rows if row["error"] < ERROR_BOUND] or sorted(rows, key=lambda row: row["error"])[:1]
    return min(good, key=lambda row: row["seconds"])["setting"], rows


def latents(flow: jf.TarFlow, batch: int) -> tuple[Tensor, Tensor]:
    """Latents and balanced labels."""
    z = draw_latents(batch, flow.config.num_tokens, flow.config.token_channels, seed=1)
    return z, torch.arange(batch) % flow.config.num_classes


def draw(
    flow: jf.TarFlow, z: Tensor, labels: Tensor, strategy: str | jf.Strategy, guidance: jf.Guidance | None,
    certify: bool = False,
) -> jf.Samples:  # fmt: skip
    """One run of the library."""
    return jf.sample(
        flow, latents=z, labels=labels, strategy=strategy, guidance=guidance, certify=certify, progress=False
    )


def measure(flow: jf.TarFlow, batch: int, guidance: jf.Guidance | None, paper: str) -> list[dict[str, Any]]:
    """Rows of seconds, calls, token evaluations and error, every method run in turn, `REPEATS` times."""
    z, labels = latents(flow, batch)
    runs = {name: partial(draw, flow, z, labels, plan, guidance) for name, plan in methods(flow, paper).items()}
    runs["auto, certified"] = partial(draw, flow, z, labels, "auto", guidance, certify=True)
    found = compare(flow, z, labels, runs, guidance=guidance, repeats=REPEATS[batch])
    baseline = found.row(GROWING_CACHE).seconds.median
    timings = {row.strategy: row.seconds for row in found.rows} | {ENCODING_PASS: found.floor}
    answers = {row.strategy: answer(row) for row in found.rows}
    return [
        {
            "batch": batch, "guidance": guidance is not None, "method": name,
            "seconds": seconds.median, "seconds_min": seconds.min, "seconds_max": seconds.max,
            "speed_up": baseline / seconds.median, **answers.get(name, {}),
        }
        for name, seconds in timings.items()
    ]  # fmt: skip


def answer(row: Row) -> dict[str, Any]:
    """How far from the sequential answer a method is, and what it computed, which the growing-cache loop cannot say."""
    error = {"max_error": row.error.max, "mean_error": row.error.mean}
    if row.samples is None:
        return error
    return error | {
        "network_calls": row.network_calls, "token_evaluations": row.token_evaluations,
        "resolved_sequentially": row.samples.resolved_sequentially,
        "sweeps": [block.sweeps for block in row.samples.stats],
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = []
    for guided in (False, True):
        lines.append(f"\n### {'With guidance (weight 1, annealed)' if guided else 'Without guidance'}\n")
        lines.append("| batch | method | seconds | speed-up | network calls | token evaluations | max error |")
        lines.append("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
        for row in rows:
            if row["guidance"] is guided:
                calls = f"{row['network_calls']:,}" if "network_calls" in row else ""
                tokens = f"{row['token_evaluations']:,}" if "token_evaluations" in row else ""
                error = f"{row['max_error']:.1e}" if "max_error" in row else ""
                lines.append(
                    f"| {row['batch']} | {row['method']} | {row['seconds']:.3f} | {row['speed_up']:.2f}x | {calls} | "
                    f"{tokens} | {error} |"
                )
    return "\n".join(lines) + "\n"


def embed(rows: str, measured_on: dict[str, Any]) -> None:
    """Put the table and the machine between the marks in docs/benchmarks.md."""
    page = RESULTS.parent / "benchmarks.md"
    before, _, rest = page.read_text().partition("<!-- results -->")
    _, _, after = rest.partition("<!-- end of results -->")
    processor = f"{measured_on['cores']} cores of {measured_on['processor']}"
    where = f"{processor}, {measured_on['threads']} threads, PyTorch {measured_on['torch']}."
    text = f"{before}<!-- results -->\n\nMeasured on {where}\n{rows}\n<!-- end of results -->{after}"
    write_atomically(page, text.encode())


def main() -> None:
    """Choose the paper's setting, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion-p2")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    arguments = parser.parse_args()
    flow = jf.load(arguments.model)
    rows: list[dict[str, Any]] = []
    grids: dict[str, Any] = {}
    for guidance in (None, GUIDANCE):
        paper, grid = choose_paper_setting(flow, guidance)
        grids["guided" if guidance else "unguided"] = {"chosen": paper, "grid": grid}
        for batch in arguments.batches:
            rows += measure(flow, batch, guidance, paper)
            for row in rows[-8:]:
                print(
                    f"  {row['batch']:3d} {row['method']:34s} {row['seconds']:.3f} s  {row['speed_up']:.2f}x",
                    flush=True,
                )
    measured_on = machine(flow.var.device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {"command": "python benchmarks/sampling.py", "model": arguments.model, "machine": measured_on,
              "tolerance": 1e-3, "rows": rows, "paper_settings": grids}  # fmt: skip
    write_json(arguments.out / "sampling.json", json.loads(json.dumps(result)))
    write_atomically(arguments.out / "sampling.md", table(rows).encode())
    if arguments.out == RESULTS:
        embed(table(rows), measured_on)


if __name__ == "__main__":
    main()
