"""`jacobiflow bench`: what each strategy costs and gives on this machine."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jacobiflow.calibration import Report
from jacobiflow.cli import options
from jacobiflow.cli.progress import progress
from jacobiflow.experiments.speed import ENCODING_PASS, FULL_PASSES, GROWING_CACHE, SEQUENTIAL, Comparison, compare
from jacobiflow.files import write_json
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.latents import draw_latents
from jacobiflow.measuring import Timing, machine
from jacobiflow.plots import bench_figure, save_png
from jacobiflow.sampling import sample
from jacobiflow.strategy import Prediction, Strategy, auto, choose

AUTO = "auto"
_STRATEGIES = (AUTO, "jacobi")
_BATCH_SIZES = (1, 4, 16)
_BASELINES = 3  # runs beside the strategies: the original loop, sequential, encoding pass
# In a heading, and in a sentence.
_ORIGINALS = {
    GROWING_CACHE: ("cache", "the original code's growing-cache loop"),
    FULL_PASSES: ("passes", "the usual loop of full passes"),
}


def bench(
    model: options.Model = "fashion-p2",
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            "--strategy",
            help="As in jacobiflow sample; give it again for each strategy. Default: auto and jacobi. The original "
            "code's loop (growing-cache, or for a MAF of full passes), the sequential loop and an encoding pass are "
            "timed in any case.",
        ),
    ] = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option("--batch-size", help="Images drawn together; give it again for each. Default: 1, 4 and 16."),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", help="Rounds that count, after one that does not.")] = 5,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            help="Largest residual |g(x) - x|, for strategies that have one; default 1e-3, or a file's own.",
        ),
    ] = None,
    report: options.ReportFile = None,
    labels: options.Labels = "balanced",
    seed: options.Seed = 0,
    guidance: options.GuidanceWeight = 0.0,
    guidance_on: options.GuidanceOn = "both",
    constant_guidance: options.ConstantGuidance = False,
    attn_temperature: options.AttnTemperature = 1.0,
    certify: Annotated[
        bool, typer.Option(help="Strategies measure and mend their residuals, in their time; the baselines do not.")
    ] = True,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    out: Annotated[Path, typer.Option("--out", help="Folder for bench.png, bench.json.")] = Path("out/bench"),
    json: options.Json = None,
) -> None:
    """Time strategies on this machine, taking turns, and compare what they give with the sequential loop's images.

    Example: jacobiflow bench --model digits-p1 --strategy jacobi --strategy "[2-4-5-6]" --repeats 3 --out out/bench
    """
    if repeats < 1:
        raise ValueError(f"--repeats {repeats}: give a positive number of rounds")
    sizes = list(dict.fromkeys(batch_size or _BATCH_SIZES))
    if min(sizes) < 1:
        raise ValueError(f"--batch-size {min(sizes)}: give a positive number of images")
    flow = options.load_model(model, device, dtype)
    guide = options.parse_guidance(guidance, guidance_on, constant_guidance, attn_temperature)
    found = None if report is None else options.load_report(report, flow)
    if found is not None and found.settings.guidance != guide:
        warnings.warn(f"--report {report}: calibrated under other guidance; it may start far off", stacklevel=2)
    names = list(dict.fromkeys(strategy or _STRATEGIES))
    plans = _plans(names, flow, found, tolerance)
    classes = {size: options.parse_labels(labels, size, flow, seed) for size in sizes}
    options.check_writable(out, json)
    where = machine(flow.var.device)
    print(
        f"{model} on {where['processor']}, {where['cores']} cores, {where['threads']} threads, "
        f"device {where['device']}, PyTorch {where['torch']}"
    )

    comparisons = []
    predictions: dict[int, Prediction] = {}
    for size in sizes:
        z = draw_latents(size, flow.config.num_tokens, flow.config.token_channels, seed)
        if AUTO in names:
            plans[AUTO] = auto(flow, size, tolerance, guide)
        runs = {
            name: partial(
                sample, flow, labels=classes[size], latents=z, strategy=plans[name], guidance=guide, certify=certify,
                progress=False,
            )
            for name in names
            if name != SEQUENTIAL
        }  # fmt: skip
        with progress(f"batch size {size}", (repeats + 1) * (len(runs) + _BASELINES)) as advance:
            comparisons.append(
                compare(flow, z, classes[size], runs, guidance=guide, repeats=repeats, after_each=lambda _: advance(1))
            )
        _print(comparisons[-1])
        if AUTO in names and (prediction := plans[AUTO].prediction) is not None:
            predictions[size] = prediction
            print(f"auto: predicted {prediction.seconds:.3f} s, without its certificates")
    heading, loop = _ORIGINALS[comparisons[0].original]
    print(f"over {heading}, over seq.: speed-up over {loop}, and over the sequential loop")
    print("evals/token: how often a token of a block was evaluated; residual: the certificate, largest |g(x) - x|")
    figures = {
        "model": model, "num_tokens": flow.config.num_tokens, "num_blocks": flow.config.num_blocks, "dtype": dtype,
        "seed": seed, "labels": labels, "guidance": None if guide is None else asdict(guide), "tolerance": tolerance,
        "report": None if report is None else str(report), "certify": certify, "repeats": repeats, "machine": where,
        "comparisons": [comparison.to_json() for comparison in comparisons],
        "predictions": {size: asdict(prediction) for size, prediction in predictions.items()},
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    save_png(bench_figure(comparisons), out / "bench.png")
    write_json(out / "bench.json", figures)
    options.report(json, figures)
    print(f"wrote {out / 'bench.png'} and {out / 'bench.json'}")


def _plans(
    names: Sequence[str], flow: ImageFlow, report: Report | None, tolerance: float | None
) -> dict[str, Strategy]:
    """The strategies by name, less "auto", which is planned for a batch size; a file keeps its own guesses.

    **Raises** `ValueError` for a name that is none, a strategy that does not fit, or a tolerance that nothing heeds.
    """
    plans: dict[str, Strategy] = {}
    for name in names:
        if name != AUTO:
            plan = choose(flow, name, 1, report=report)
            plans[name] = plan if tolerance is None else plan.with_tolerance(tolerance)
    heeded = AUTO in names or any(plan.has_tolerance for plan in plans.values())
    if tolerance is not None and not heeded:
        raise ValueError(f"--tolerance {tolerance:g}: every strategy stops after a number of sweeps; leave it out")
    return plans


def _print(comparison: Comparison) -> None:
    print(f"\nbatch size {comparison.batch_size}")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("strategy", overflow="fold")
    for column in (
        "median\nseconds", "min to\nmax", f"over\n{_ORIGINALS[comparison.original][0]}", "over\nseq.", "network\ncalls",
        "evals/\ntoken", "max\nerror", "residual",
    ):  # fmt: skip
        table.add_column(column, justify="right", min_width=max(map(len, column.split())), no_wrap=True)
    for row in comparison.rows:
        calls, evaluations, residual = row.network_calls, row.evaluations_per_token, row.certificate
        table.add_row(
            escape(row.strategy), *_seconds(row.seconds),
            f"{comparison.speed_up(row, comparison.original):.2f}", f"{comparison.speed_up(row, SEQUENTIAL):.2f}",
            "" if calls is None else f"{calls:,}", "" if evaluations is None else f"{evaluations:.2f}",
            f"{row.error.max:.1e}" if row.error.max else "0", "" if residual is None else f"{residual:.1e}",
        )  # fmt: skip
    table.add_row(ENCODING_PASS, *_seconds(comparison.floor))
    Console().print(table)


def _seconds(timing: Timing) -> tuple[str, str]:
    def shown(seconds: float) -> str:
        return f"{seconds:.3f}" if seconds < 10 else f"{seconds:.1f}"

    return shown(timing.median), f"{shown(timing.min)}-{shown(timing.max)}"
