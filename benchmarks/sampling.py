"""Times every way to sample from `fashion-p2` in one interleaved run: `python benchmarks/sampling.py`.

Writes docs/results/sampling.json and .md and the table in docs/benchmarks.md. Needs an otherwise idle machine and
about 10 minutes on two cores. The baseline is the original sampler's growing-cache loop, benchmarks/growing_cache.py.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from growing_cache import growing_cache_sample
from torch import Tensor

import jacobiflow as jf
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
    """What is compared, beside the growing-cache loop and the encoding pass."""
    tolerance = jf.Tolerance(1e-3)
    return {
        "sequential": "sequential",
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
        error = float((result.images - exact).abs().nan_to_num(nan=torch.inf).max())
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
    exact = growing(flow, z, labels, guidance)
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], Any]] = {"growing cache": lambda: growing(flow, z, labels, guidance)}
    for name, strategy in methods(flow, paper).items():
        runs[name] = partial(draw, flow, z, labels, strategy, guidance)
    runs["auto, certified"] = lambda: draw(flow, z, labels, "auto", guidance, certify=True)
    with torch.no_grad():
        runs["encoding pass"] = lambda: flow.encode(exact, labels)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(REPEATS[batch] + 1):  # the first is a warm-up
            for name, run in runs.items():
                started = time.perf_counter()
                result = run()
                if repeat:
                    seconds[name].append(time.perf_counter() - started)
                elif isinstance(result, jf.Samples):
                    error = (result.images - exact).abs().nan_to_num(nan=torch.inf)
                    rows[name] = {
                        "network_calls": result.network_calls, "token_evaluations": result.token_evaluations,
                        "max_error": float(error.max()), "mean_error": float(error.mean()),
                        "resolved_sequentially": result.resolved_sequentially,
                        "sweeps": [block.sweeps for block in result.stats],
                    }  # fmt: skip
    baseline = statistics.median(seconds["growing cache"])
    return [
        {
            "batch": batch, "guidance": guidance is not None, "method": name,
            "seconds": statistics.median(times), "seconds_min": min(times), "seconds_max": max(times),
            "speed_up": baseline / statistics.median(times), **rows.get(name, {}),
        }
        for name, times in seconds.items()
    ]  # fmt: skip


def growing(flow: jf.TarFlow, z: Tensor, labels: Tensor, guidance: jf.Guidance | None) -> Tensor:
    """The baseline."""
    if guidance is None:
        return growing_cache_sample(flow, z, labels)
    return growing_cache_sample(flow, z, labels, guidance.weight, guidance.annealed, guidance.attn_temperature)


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


def embed(rows: str, machine: dict[str, Any]) -> None:
    """Put the table and the machine between the marks in docs/benchmarks.md."""
    page = RESULTS.parent / "benchmarks.md"
    before, _, rest = page.read_text().partition("<!-- results -->")
    _, _, after = rest.partition("<!-- end of results -->")
    where = f"{machine['processor']}, {machine['threads']} threads, PyTorch {machine['torch']}."
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
    machine = {
        "processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "python": platform.python_version(), "jacobiflow": jf.__version__,
    }  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {"command": "python benchmarks/sampling.py", "model": arguments.model, "machine": machine,
              "tolerance": 1e-3, "rows": rows, "paper_settings": grids}  # fmt: skip
    write_json(arguments.out / "sampling.json", json.loads(json.dumps(result)))
    write_atomically(arguments.out / "sampling.md", table(rows).encode())
    if arguments.out == RESULTS:
        embed(table(rows), machine)


def processor() -> str:
    """The processor's model name."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor()
    lines = path.read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    extensions = " with AVX512-BF16 and AMX" if any("amx_bf16" in line for line in lines) else ""
    return f"{sum(line.startswith('processor') for line in lines)} cores of {name}{extensions}"


if __name__ == "__main__":
    main()
