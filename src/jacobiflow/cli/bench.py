"""`jacobiflow bench`: time and error of each strategy on this machine."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

import jacobiflow as jf
from jacobiflow.cli import loading, options
from jacobiflow.cli.output import progress_bar, show_table

if TYPE_CHECKING:
    from jacobiflow.comparison.compare import Comparison, SamplerResult
    from jacobiflow.models.flow import Flow
    from jacobiflow.utils.progress import Progress
    from jacobiflow.utils.timing import Timing

_FIGURE, _TABLE = "bench.png", "bench.json"
_STRATEGY = (
    "A strategy as in jacobiflow sample; may be repeated. Default: auto and jacobi. The original sampler, the "
    "exact loop and an encoding pass are always timed."
)
_BATCH_SIZE = "Images solved together; may be repeated. Default: 1, 4 and 16."
_LEGEND = """over: speed-up over the original sampler, and over the exact loop
evals/token: token evaluations in a block, for each token of each sample
residual: the largest |g(x) - x|; exact: every block was solved token by token
*: not certified: the strategy stops after a fixed number of sweeps"""


def bench(
    model: options.Model = "fashion-p2",
    strategy: Annotated[list[str] | None, Option(help=_STRATEGY)] = None,
    batch_size: Annotated[list[int] | None, Option(min=1, max=options.MAX_BATCH_SIZE, help=_BATCH_SIZE)] = None,
    repeats: Annotated[int, Option(min=1, help="Timed rounds, after a warm-up.")] = 5,
    tolerance: options.Tolerance = None,
    report: options.ReportFile = None,
    labels: options.Labels = "balanced",
    seed: options.Seed = 0,
    guidance: options.RecommendedGuidance = None,
    plain: options.NoGuidance = False,
    certify: Annotated[bool, Option(help="Certify the samples; the time includes it.")] = True,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    out: Annotated[Path, Option(help="Folder for bench.png, bench.json.")] = Path("out/bench"),
) -> dict[str, Any]:
    """Time strategies and measure their errors.

    The strategies, the original sampler and the exact loop run in turn on the same latents. Errors are differences
    from the images of the exact loop.

    Example: jacobiflow bench --model digits-p1 --strategy jacobi --strategy "[2-4-5-6]" --repeats 3
    """
    from jacobiflow import native, plots
    from jacobiflow.blocks.context import Context
    from jacobiflow.comparison import baselines, compare
    from jacobiflow.fixed_point.options import SolveOptions
    from jacobiflow.models import latents
    from jacobiflow.sampling import sample
    from jacobiflow.utils import files, timing

    flow = loading.load_model(model, device, dtype)
    flow, guidance_line = loading.guide(flow, guidance, plain, labels != "none" and not flow.reads_text)
    names = [name for name in dict.fromkeys(strategy or ("auto", "jacobi")) if name != baselines.SEQUENTIAL]
    guesses = loading.load_report(report, flow)
    cases = []
    with progress_bar() as progress:
        for size in dict.fromkeys(batch_size or (1, 4, 16)):
            z = latents.draw_latents(size, flow.config.num_tokens, flow.config.token_channels, seed)
            classes = options.parse_labels(labels, size, flow, seed)
            plans = {name: _choose(flow, name, size, tolerance, guesses, progress) for name in names}
            context, solve_options = Context(classes), SolveOptions(certify=certify)
            runs = {
                name: partial(sample.sample_with_strategy, flow, plan, z, context, solve_options)
                for name, plan in plans.items()
            }
            cases.append((z, classes, runs))
    with files.output_directory(out, "benchmark", (_FIGURE, _TABLE)), progress_bar() as progress:
        machine = timing.describe_machine(flow.var.device)
        print(
            f"{model} on {machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, device "
            f"{machine['device']}, PyTorch {machine['torch']}\nnative exact loops: {native.describe()}\n{guidance_line}"
        )
        comparisons = []
        for z, classes, runs in cases:
            comparisons.append(compare.compare_samplers(flow, z, classes, runs, repeats=repeats, progress=progress))
            _print_comparison(comparisons[-1])
        print(_LEGEND)
        results = {
            "model": model, "num_tokens": flow.config.num_tokens, "num_blocks": flow.config.num_blocks, "dtype": dtype,
            "seed": seed, "labels": labels, "guidance": None if flow.guidance is None else asdict(flow.guidance),
            "tolerance": tolerance, "report": None if report is None else str(report), "certify": certify,
            "repeats": repeats, "machine": machine, "comparisons": [each.to_json() for each in comparisons],
        }  # fmt: skip
        plots.save_png(plots.bench_figure(comparisons), out / _FIGURE)
        files.write_json(out / _TABLE, results)
    print(f"wrote {out / _FIGURE} and {out / _TABLE}")
    return results


def _choose(
    flow: Flow, name: str, size: int, tolerance: float | None, report: jf.CalibrationReport | None, progress: Progress
) -> jf.Strategy:
    """Chooses a strategy, to `tolerance` unless it stops after a number of sweeps."""
    from jacobiflow.planner import choose, is_auto

    auto_tolerance = tolerance if is_auto(name) else None
    plan = choose(flow, name, size, tolerance=auto_tolerance, report=report, progress=progress)
    return plan if tolerance is None else plan.with_tolerance(tolerance)


def _print_comparison(comparison: Comparison) -> None:
    from jacobiflow.comparison.compare import ENCODING_PASS

    over = ["over\n" + name.replace(" ", "\n") for name in comparison.baselines]
    columns = ("strategy", "median\nseconds", "min to\nmax", *over, "evals/\ntoken", "max\nerror", "residual")
    rows = []
    for row in comparison.results:
        evaluations = row.evaluations_per_token
        rows.append((
            row.strategy, *_seconds(row.seconds),
            *(f"{comparison.speed_up(row, name):.2f}" for name in comparison.baselines),
            "" if evaluations is None else f"{evaluations:.2f}",
            f"{row.error.max:.1e}" if row.error.max else "0", _residual(row),
        ))  # fmt: skip
    rows.append((ENCODING_PASS, *_seconds(comparison.encoding_pass), *[""] * (len(columns) - 3)))
    print(f"\nbatch size {comparison.batch_size}")
    show_table(columns, rows)


def _residual(row: SamplerResult) -> str:
    """Formats the largest residual, with an asterisk if the strategy has no tolerance."""
    if row.is_exact:
        return "exact"
    if row.samples is None or row.residual is None:
        return ""
    return f"{row.residual:.1e}{'*' * (row.samples.tolerance is None)}"


def _seconds(timing: Timing) -> tuple[str, str]:
    """Formats the median, and the range from the fastest to the slowest round."""
    least, median, most = (
        f"{seconds:.{3 if seconds < 10 else 1}f}" for seconds in (timing.min, timing.median, timing.max)
    )
    return median, f"{least}-{most}"
