"""`jacobiflow bench`: time and error of each strategy on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from jacobiflow.cli import options
from jacobiflow.cli.screen import progress_bar, show_table

if TYPE_CHECKING:
    from jacobiflow.calibration import Report
    from jacobiflow.comparison import Comparison, Row
    from jacobiflow.flows.image_flow import ImageFlow
    from jacobiflow.measuring import Timing
    from jacobiflow.progress import Progress
    from jacobiflow.strategy import Strategy

_PICTURE, _TABLE = "bench.png", "bench.json"
_STRATEGY = (
    "As in jacobiflow sample; give it again for each. Default: auto and jacobi. The original sampler, the sequential "
    "loop and an encoding pass are always timed."
)
_BATCH_SIZE = "Images solved together; give it again for each. Default: 1, 4 and 16."
_LEGEND = """over: speed-up over the original sampler, and over the sequential loop
evals/token: how often a token of a block was evaluated
residual: the largest |g(x) - x|; exact: every block was solved token by token
*: not certified: the strategy stops after a fixed number of sweeps"""


def bench(
    model: options.Model = "fashion-p2",
    strategy: Annotated[list[str] | None, Option(help=_STRATEGY)] = None,
    batch_size: Annotated[list[int] | None, Option(min=1, max=options.MOST_AT_ONCE, help=_BATCH_SIZE)] = None,
    repeats: Annotated[int, Option(min=1, help="Rounds that count, after a warm-up.")] = 5,
    tolerance: options.Tolerance = None,
    report: options.ReportFile = None,
    labels: options.Labels = "balanced",
    seed: options.Seed = 0,
    guidance: options.Guidance = "0",
    certify: Annotated[
        bool, Option(help="Time strategies with their certificates, and with the samples that they solve again.")
    ] = True,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    out: Annotated[Path, Option(help="Folder for bench.png, bench.json.")] = Path("out/bench"),
) -> dict[str, Any]:
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
    from jacobiflow.files import own_folder, write_json
    from jacobiflow.latents import draw_latents
    from jacobiflow.measuring import machine
    from jacobiflow.plots import bench_figure, save_png
    from jacobiflow.sampling import draw

    sizes = list(dict.fromkeys(batch_size or (1, 4, 16)))
    flow = options.load_model(model, device, dtype).guided(options.parse_guidance(guidance))
    names = [name for name in dict.fromkeys(strategy or ("auto", "jacobi")) if name != SEQUENTIAL]
    guesses = options.load_report(report, flow)
    with progress_bar() as progress:
        plans = {
            size: {name: _choose(flow, name, size, tolerance, guesses, progress) for name in names} for size in sizes
        }
    classes = {size: options.parse_labels(labels, size, flow, seed) for size in sizes}
    with own_folder(out, "benchmark", (_PICTURE, _TABLE)), progress_bar() as progress:
        where = machine(flow.var.device)
        print(
            f"{model} on {where['processor']}, {where['cores']} cores, {where['threads']} threads, device "
            f"{where['device']}, PyTorch {where['torch']}\nnative exact loops: {native.describe()}"
        )
        comparisons = []
        for size in sizes:
            z = draw_latents(size, flow.config.num_tokens, flow.config.token_channels, seed)
            runs = {
                name: partial(draw, flow, plan, z, classes[size], certify=certify) for name, plan in plans[size].items()
            }
            comparisons.append(compare(flow, z, classes[size], runs, repeats=repeats, progress=progress))
            _print(comparisons[-1])
        print(_LEGEND)
        results = {
            "model": model, "num_tokens": flow.config.num_tokens, "num_blocks": flow.config.num_blocks, "dtype": dtype,
            "seed": seed, "labels": labels, "guidance": None if flow.guidance is None else asdict(flow.guidance),
            "tolerance": tolerance, "report": None if report is None else str(report), "certify": certify,
            "repeats": repeats, "machine": where, "comparisons": [each.to_json() for each in comparisons],
        }  # fmt: skip
        save_png(bench_figure(comparisons), out / _PICTURE)
        write_json(out / _TABLE, results)
    print(f"wrote {out / _PICTURE} and {out / _TABLE}")
    return results


def _choose(
    flow: ImageFlow, name: str, size: int, tolerance: float | None, report: Report | None, progress: Progress
) -> Strategy:
    """The strategy of that name, to `tolerance` unless it stops after a number of sweeps."""
    from jacobiflow.strategy import choose, is_auto

    if is_auto(name):
        return choose(flow, name, size, tolerance=tolerance, progress=progress)
    plan = choose(flow, name, size, report=report)
    return plan if tolerance is None else plan.with_tolerance(tolerance)


def _print(comparison: Comparison) -> None:
    from jacobiflow.comparison import ENCODING_PASS

    over = ["over\n" + name.replace(" ", "\n") for name in comparison.baselines]
    columns = ("strategy", "median\nseconds", "min to\nmax", *over, "evals/\ntoken", "max\nerror", "residual")
    rows = []
    for row in comparison.rows:
        evaluations = row.evaluations_per_token
        rows.append((
            row.strategy, *_seconds(row.seconds),
            *(f"{comparison.speed_up(row, name):.2f}" for name in comparison.baselines),
            "" if evaluations is None else f"{evaluations:.2f}",
            f"{row.error.max:.1e}" if row.error.max else "0", _residual(row),
        ))  # fmt: skip
    rows.append((ENCODING_PASS, *_seconds(comparison.floor), *[""] * (len(columns) - 3)))
    print(f"\nbatch size {comparison.batch_size}")
    show_table(columns, rows)


def _residual(row: Row) -> str:
    """The largest residual, with an asterisk if there was no tolerance for it."""
    if row.exact:
        return "exact"
    if row.samples is None or row.certificate is None:
        return ""
    return f"{row.certificate:.1e}{'*' * (row.samples.tolerance is None)}"


def _seconds(timing: Timing) -> tuple[str, str]:
    least, median, most = (
        f"{seconds:.{3 if seconds < 10 else 1}f}" for seconds in (timing.min, timing.median, timing.max)
    )
    return median, f"{least}-{most}"
