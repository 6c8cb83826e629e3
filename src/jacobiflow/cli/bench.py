"""`jacobiflow bench`: what each strategy costs and gives on this machine."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from jacobiflow import native
from jacobiflow.baselines import SEQUENTIAL
from jacobiflow.cli import options, pages, paths
from jacobiflow.cli.progress import progress
from jacobiflow.cli.tables import show
from jacobiflow.errors import InputValueError
from jacobiflow.experiments.speed import ENCODING_PASS, Comparison, Row, compare, timed_anyway
from jacobiflow.files import check_ours, write_json
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.guidance import Guidance
from jacobiflow.latents import draw_latents
from jacobiflow.locking import locked
from jacobiflow.measuring import Timing, machine
from jacobiflow.plots import Picture, Table, bench_figure, check_picture, save_png
from jacobiflow.sampling import draw
from jacobiflow.strategy import Strategy, choose, is_auto

_STRATEGIES = ("auto", "jacobi")
_BATCH_SIZES = (1, 4, 16)
_PICTURE, _TABLE = "bench.png", "bench.json"


def bench(
    context: typer.Context,
    model: options.Model = "fashion-p2",
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            "--strategy",
            help="As in jacobiflow sample; give it again for each strategy. Default: auto and jacobi. The loop of the "
            "flow's original code, the sequential loop and an encoding pass are timed in any case.",
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
        bool,
        typer.Option(
            help="Strategies measure their residuals, and solve again what is above the tolerance, within their time."
        ),
    ] = True,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    out: Annotated[Path, typer.Option("--out", help="Folder for bench.png, bench.json.")] = Path("out/bench"),
    json: options.Json = None,
    html: options.Html = None,
) -> None:
    """Time strategies on this machine, taking turns, and compare what they give with the sequential loop's images.

    Example: jacobiflow bench --model digits-p1 --strategy jacobi --strategy "[2-4-5-6]" --repeats 3 --html bench.html
    """
    paths.check(json, out, (_PICTURE, _TABLE), html=html, model=model, strategy=strategy, labels=labels, report=report)
    if repeats < 1:
        raise InputValueError(f"--repeats {repeats}: give a positive number of rounds")
    sizes = list(dict.fromkeys(batch_size or _BATCH_SIZES))
    if min(sizes) < 1:
        raise InputValueError(f"--batch-size {min(sizes)}: give a positive number of images")
    flow = options.load_model(model, device, dtype)
    guide = options.parse_guidance(guidance, guidance_on, constant_guidance, attn_temperature)
    found = None if report is None else options.load_report(report, flow)
    if found is not None and found.settings.guidance != guide:
        warnings.warn(f"--report {report}: calibrated under other guidance; it may start far off", stacklevel=2)
    names = [name for name in dict.fromkeys(strategy or _STRATEGIES) if name != SEQUENTIAL]
    choosing = partial(choose, flow, guidance=guide, report=found)
    fixed = {size: _fixed(names, size, choosing, tolerance) for size in sizes}
    classes = {size: options.parse_labels(labels, size, flow, seed) for size in sizes}
    with locked(out):
        check_picture(out / _PICTURE)
        check_ours(out / _TABLE, ("model", "machine", "comparisons", "predictions"))
        where = machine(flow.var.device)
        said = _said(model, where)
        print(*said, sep="\n")
        comparisons, predictions, tables = [], {}, []
        for size in sizes:
            plans = {name: fixed[size].get(name) or choosing(name, size, tolerance=tolerance) for name in names}
            comparisons.append(_timed(flow, size, classes[size], seed, plans, guide, certify, repeats))
            predictions[size] = _predictions(plans)
            tables.append(_table(comparisons[-1], predictions[size]))
            print()
            show(tables[-1])
        legend = _legend(comparisons[0])
        print(legend)
        figures = {
            "model": model, "num_tokens": flow.config.num_tokens, "num_blocks": flow.config.num_blocks, "dtype": dtype,
            "seed": seed, "labels": labels, "guidance": None if guide is None else asdict(guide),
            "tolerance": tolerance, "report": None if report is None else str(report), "certify": certify,
            "repeats": repeats, "machine": where,
            "comparisons": [comparison.to_json() for comparison in comparisons], "predictions": predictions,
        }  # fmt: skip
        picture = bench_figure(comparisons)
        save_png(picture, out / _PICTURE)
        write_json(out / _TABLE, figures)
    options.report(json, figures)
    if html is not None:
        tables[-1] = replace(tables[-1], note="\n".join(filter(None, (tables[-1].note, legend))))
        pages.write(
            html, context, flow, f"Speed of {model}", f"{'; '.join(said)}.", figures, tables,
            [Picture("Error against time: faster further left, nearer to the exact images further down", picture)],
        )  # fmt: skip
    print(f"wrote {out / _PICTURE} and {out / _TABLE}")


def _said(model: str, where: Mapping[str, Any]) -> tuple[str, str]:
    """What is timed, and on what."""
    return (
        f"{model} on {where['processor']}, {where['cores']} cores, {where['threads']} threads, "
        f"device {where['device']}, PyTorch {where['torch']}",
        f"native exact loops: {native.describe()}",
    )


def _timed(
    flow: ImageFlow, size: int, labels: Tensor | None, seed: int, plans: Mapping[str, Strategy],
    guidance: Guidance | None, certify: bool, repeats: int,
) -> Comparison:  # fmt: skip
    """All strategies at one batch size."""
    z = draw_latents(size, flow.config.num_tokens, flow.config.token_channels, seed)
    runs = {
        name: partial(draw, flow, plan, z, labels, guidance=guidance, certify=certify) for name, plan in plans.items()
    }
    with progress(f"batch size {size}", (repeats + 1) * (len(runs) + len(timed_anyway(flow)))) as advance:
        return compare(flow, z, labels, runs, guidance=guidance, repeats=repeats, after_each=lambda _: advance(1))


def _fixed(
    names: Sequence[str], size: int, choosing: Callable[..., Strategy], tolerance: float | None
) -> dict[str, Strategy]:
    """The strategies that need no plan, by name, to `tolerance` where they have one.

    **Raises** `ValueError` for a strategy that does not fit, or a tolerance that all of them would ignore.
    """
    found = {name: choosing(name, size) for name in names if not is_auto(name)}
    if tolerance is None:
        return found
    if found and len(found) == len(names) and not any(plan.has_tolerance for plan in found.values()):
        raise InputValueError(f"--tolerance {tolerance:g}: every strategy stops after a number of sweeps; leave it out")
    return {name: plan.with_tolerance(tolerance) for name, plan in found.items()}


def _predictions(plans: Mapping[str, Strategy]) -> dict[str, Any]:
    """What was predicted for the plans that were made here."""
    return {name: asdict(p.prediction) for name, p in plans.items() if is_auto(name) and p.prediction is not None}


def _table(comparison: Comparison, predictions: Mapping[str, Any]) -> Table:
    over = [f"over\n{_heading(name)}" for name in comparison.baselines]
    columns = (
        "strategy", "median\nseconds", "min to\nmax", *over, "network\ncalls", "evals/\ntoken", "max\nerror",
        "residual",
    )  # fmt: skip
    rows = []
    for row in comparison.rows:
        calls, evaluations, residual = row.network_calls, row.evaluations_per_token, row.certificate
        rows.append((
            row.strategy, *_seconds(row.seconds),
            *(f"{comparison.speed_up(row, name):.2f}" for name in comparison.baselines),
            "" if calls is None else f"{calls:,}", "" if evaluations is None else f"{evaluations:.2f}",
            f"{row.error.max:.1e}" if row.error.max else "0",
            "exact" if row.exact else "" if residual is None else f"{residual:.1e}{_mark(row)}",
        ))  # fmt: skip
    rows.append((ENCODING_PASS, *_seconds(comparison.floor), *[""] * (len(columns) - 3)))
    said = [f"{name}: predicted {prediction['seconds']:.3f} s" for name, prediction in predictions.items()]
    return Table(f"batch size {comparison.batch_size}", columns, rows, note="\n".join(said))


def _legend(comparison: Comparison) -> str:
    lines = []
    for name in comparison.baselines:
        loop = "the sequential loop" if name == SEQUENTIAL else f"the loop of the original code, {name}"
        lines.append(f"over {_heading(name)}: times as fast as {loop}")
    return "\n".join([
        *lines,
        "evals/token: how often a token of a block was evaluated; residual: the certificate, largest |g(x) - x|, or "
        "exact if every block was solved token by token",
        *["*: not certified: the strategy stops after a fixed number of sweeps"] * any(map(_mark, comparison.rows)),
    ])  # fmt: skip


def _mark(row: Row) -> str:
    """An asterisk if the samples were measured and held to no tolerance."""
    return "*" * (row.samples is not None and row.samples.outcome.has_shortfall and row.samples.tolerance is None)


def _heading(baseline: str) -> str:
    return "seq." if baseline == SEQUENTIAL else "orig."


def _seconds(timing: Timing) -> tuple[str, str]:
    def shown(seconds: float) -> str:
        return f"{seconds:.3f}" if seconds < 10 else f"{seconds:.1f}"

    return shown(timing.median), f"{shown(timing.min)}-{shown(timing.max)}"
