"""`jacobiflow bench`: time and error of each strategy on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jacobiflow.cli import options
from jacobiflow.cli.screen import Table, progress_bar, show

if TYPE_CHECKING:
    from jacobiflow.calibration import Report
    from jacobiflow.comparison import Comparison, Row
    from jacobiflow.flows.image_flow import ImageFlow
    from jacobiflow.measuring import Timing
    from jacobiflow.progress import Progress
    from jacobiflow.strategy import Strategy

_STRATEGIES = ("auto", "jacobi")
_BATCH_SIZES = (1, 4, 16)
_PICTURE, _TABLE = "bench.png", "bench.json"


def bench(
    model: options.Model = "fashion-p2",
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            "--strategy",
            help="As in jacobiflow sample; give it again for each. Default: auto and jacobi. The original sampler, the "
            "sequential loop and an encoding pass are always timed.",
        ),
    ] = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(
            "--batch-size",
            min=1,
            max=options.MOST_AT_ONCE,
            help="Images solved together; give it again for each. Default: 1, 4 and 16.",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Rounds that count, after a warm-up.")] = 5,
    tolerance: options.Tolerance = None,
    report: options.ReportFile = None,
    labels: options.Labels = "balanced",
    seed: options.Seed = 0,
    guidance: options.Guidance = "0",
    certify: Annotated[
        bool,
        typer.Option(help="Time strategies with their certificates, and with the samples that they solve again."),
    ] = True,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    out: Annotated[Path, typer.Option("--out", help="Folder for bench.png, bench.json.")] = Path("out/bench"),
    json: options.Json = None,
) -> None:
    """Time strategies and measure their errors.

    All are interleaved on the same latents, beside the original sampler and the sequential loop; errors are against the
    sequential loop's images.

    Example: jacobiflow bench --model digits-p1 --strategy jacobi --strategy "[2-4-5-6]" --repeats 3
    """
    from dataclasses import asdict
    from functools import partial

    from jacobiflow import native
    from jacobiflow.baselines import SEQUENTIAL
    from jacobiflow.comparison import compare
    from jacobiflow.files import write_json
    from jacobiflow.latents import draw_latents
    from jacobiflow.locking import own_folder
    from jacobiflow.measuring import machine
    from jacobiflow.plots import bench_figure, save_png
    from jacobiflow.sampling import draw

    options.check_files(model, [*(strategy or ()), labels, report], json=json)
    sizes = list(dict.fromkeys(batch_size or _BATCH_SIZES))
    flow = options.load_model(model, device, dtype).guided(options.parse_guidance(guidance))
    names = [name for name in dict.fromkeys(strategy or _STRATEGIES) if name != SEQUENTIAL]
    guesses = options.load_report(report, flow)
    with progress_bar() as progress:
        plans = {
            size: {name: _choose(flow, name, size, tolerance, guesses, progress) for name in names} for size in sizes
        }
    classes = {size: options.parse_labels(labels, size, flow, seed) for size in sizes}
    with own_folder(out, "benchmark", (_PICTURE, _TABLE)), progress_bar() as progress:
        where = machine(flow.var.device)
        print(f"{model} on {where['processor']}, {where['cores']} cores, {where['threads']} threads, device "
              f"{where['device']}, PyTorch {where['torch']}", f"native exact loops: {native.describe()}",
              sep="\n")  # fmt: skip
        comparisons = []
        for size in sizes:
            z = draw_latents(size, flow.config.num_tokens, flow.config.token_channels, seed)
            runs = {
                name: partial(draw, flow, plan, z, classes[size], certify=certify) for name, plan in plans[size].items()
            }
            comparisons.append(compare(flow, z, classes[size], runs, repeats=repeats, progress=progress))
            print()
            show(_table(comparisons[-1]))
        print(_legend(comparisons[0]))
        results = {
            "model": model, "num_tokens": flow.config.num_tokens, "num_blocks": flow.config.num_blocks, "dtype": dtype,
            "seed": seed, "labels": labels, "guidance": None if flow.guidance is None else asdict(flow.guidance),
            "tolerance": tolerance, "report": None if report is None else str(report), "certify": certify,
            "repeats": repeats, "machine": where, "comparisons": [each.to_json() for each in comparisons],
        }  # fmt: skip
        save_png(bench_figure(comparisons), out / _PICTURE)
        write_json(out / _TABLE, results)
    options.write_results(json, results)
    print(f"wrote {out / _PICTURE} and {out / _TABLE}")


def _choose(
    flow: ImageFlow, name: str, size: int, tolerance: float | None, report: Report | None, progress: Progress
) -> Strategy:
    """The strategy of that name, to `tolerance` unless it stops after a number of sweeps."""
    from jacobiflow.strategy import choose, is_auto

    if is_auto(name):
        return choose(flow, name, size, tolerance=tolerance, progress=progress)
    plan = choose(flow, name, size, report=report)
    return plan if tolerance is None else plan.with_tolerance(tolerance)


def _table(comparison: Comparison) -> Table:
    from jacobiflow.comparison import ENCODING_PASS

    over = [f"over\n{_heading(name)}" for name in comparison.baselines]
    columns = (
        "strategy", "median\nseconds", "min to\nmax", *over, "network\ncalls", "evals/\ntoken", "max\nerror",
        "residual",
    )  # fmt: skip
    rows = []
    for row in comparison.rows:
        calls = None if row.samples is None else row.samples.network_calls
        evaluations, residual = row.evaluations_per_token, row.certificate
        rows.append((
            row.strategy, *_seconds(row.seconds),
            *(f"{comparison.speed_up(row, name):.2f}" for name in comparison.baselines),
            "" if calls is None else f"{calls:,}", "" if evaluations is None else f"{evaluations:.2f}",
            f"{row.error.max:.1e}" if row.error.max else "0",
            "exact" if row.exact else "" if residual is None else f"{residual:.1e}{_mark(row)}",
        ))  # fmt: skip
    rows.append((ENCODING_PASS, *_seconds(comparison.floor), *[""] * (len(columns) - 3)))
    return Table(f"batch size {comparison.batch_size}", columns, rows)


def _legend(comparison: Comparison) -> str:
    references = {"seq.": "the sequential loop", "orig.": f"the original sampler, {comparison.original}"}
    lines = [
        *(f"over {name}: times as fast as {references[name]}" for name in map(_heading, comparison.baselines)),
        "evals/token: how often a token of a block was evaluated",
        "residual: the largest |g(x) - x|; exact: every block was solved token by token",
    ]
    if any(map(_mark, comparison.rows)):
        lines.append("*: not certified: the strategy stops after a fixed number of sweeps")
    return "\n".join(lines)


def _mark(row: Row) -> str:
    """An asterisk if the samples were measured against no tolerance."""
    return "*" * (row.samples is not None and row.samples.outcome.has_shortfall and row.samples.tolerance is None)


def _heading(baseline: str) -> str:
    return "seq." if baseline == "sequential" else "orig."


def _seconds(timing: Timing) -> tuple[str, str]:
    def text(seconds: float) -> str:
        return f"{seconds:.3f}" if seconds < 10 else f"{seconds:.1f}"

    return text(timing.median), f"{text(timing.min)}-{text(timing.max)}"
