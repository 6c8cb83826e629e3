"""`jacobiflow trace`: how sampling converges, in pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from jacobiflow.calibration import Report
from jacobiflow.cli import options, paths
from jacobiflow.errors import InputValueError
from jacobiflow.experiments.front import Trajectory, record
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.latents import draw_latents
from jacobiflow.locking import locked
from jacobiflow.plots import (
    check_picture,
    comparison_sheet,
    convergence_figure,
    front_frames,
    front_still,
    rows_sheet,
    save_gif,
    save_png,
    segments_figure,
    trace_sheet,
)
from jacobiflow.sampling import Samples, sample
from jacobiflow.solvers import Latent, MaxSweeps, Solver, Whole, Zeros
from jacobiflow.strategy import Strategy, choose

_TOLERANCE = 1e-2
_ANIMATION = "front.gif"
_PICTURES = (
    "convergence.png",
    "segments.png",
    "sampling.png",
    "guesses.png",
    "comparison.png",
    "front.png",
    _ANIMATION,
)


def trace(
    report: Annotated[Path, typer.Option("--report", help="A report of jacobiflow calibrate.")],
    model: options.Model = "fashion-p2",
    num: Annotated[int, typer.Option("--num", help="Images in a row of a sheet.")] = 10,
    labels: options.Labels = "balanced",
    strategy: Annotated[
        str | None,
        typer.Option(
            "--strategy",
            help="Compared with the sequential loop. Default: the report's proposal, or Jacobi where it has no CRM.",
        ),
    ] = None,
    denoise: Annotated[
        float | None, typer.Option("--denoise", help="Rate of one denoising step; default: 1 where it can be done.")
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    out: Annotated[Path, typer.Option("--out", help="Folder for the pictures.")] = Path("out/trace"),
    json: options.Json = None,
) -> None:
    """Draw how a flow's blocks converge, from a report: the paper's Figures 2, 5, 3, 4 and 7.

    Writes convergence.png (distance to the solution by sweep, all blocks), segments.png (in the segments of tough
    blocks), sampling.png (from noise through the blocks to the image), guesses.png (the effect of guess and sweeps),
    comparison.png (a strategy beside the sequential loop), and front.gif and front.png (how the tokens of the slowest
    block settle, call by call: one by one, in a window, and all at once). Samples are guided as the report is.

    Example: jacobiflow trace --model fashion-p2 --report out/report.json --out out/trace
    """
    if not 1 <= num <= 20:
        raise InputValueError(f"--num {num}: give 1 to 20 images")
    paths.check(json, out, _PICTURES, model=model, report=report, strategy=strategy, labels=labels)
    for name in _PICTURES:
        check_picture(out / name)
    flow = options.load_model(model, device, dtype)
    found = options.load_report(report, flow)
    plan = _plan(flow, strategy, num, found)
    rate = float(flow.config.noise_std > 0) if denoise is None else denoise
    classes = options.parse_labels(labels, num, flow, seed)
    draw = partial(
        sample, flow, num, classes, seed, guidance=found.settings.guidance, certify=False, progress=sys.stderr.isatty()
    )
    with locked(out):
        pictures, rows = _draw(flow, found, plan, draw, rate)
        title, trajectories = _front(flow, found, model, num, classes, seed, rate)
        pictures["front.png"], frames = front_still(title, trajectories), front_frames(title, trajectories)
        for name in _PICTURES:
            if name == _ANIMATION:
                save_gif(frames, out / name)
            elif name in pictures:
                save_png(pictures[name], out / name)
            else:
                (out / name).unlink(missing_ok=True)  # it would be that of another report
        options.report(json, {"model": model, "num": num, "seed": seed, "strategy": str(plan), "guesses": rows})
    for row in rows:
        print(row["caption"])
    print(f"wrote {', '.join((*pictures, _ANIMATION))} to {out}")


def _front(
    flow: ImageFlow, report: Report, model: str, num: int, labels: Tensor | None, seed: int, rate: float
) -> tuple[str, dict[str, Trajectory]]:
    """A title, and how the slowest block is solved for the one of `num` samples that takes the median of sweeps."""
    sweeps = report.slowest_sweeps("noise", _TOLERANCE)
    block = max(range(flow.config.num_blocks), key=sweeps.__getitem__)
    latents = draw_latents(num, flow.config.num_tokens, flow.config.token_channels, seed)
    trajectories = record(flow, block, latents, labels, report.settings.guidance, rate)
    title = f"{Path(model).name}: one image from the same noise, {flow.config.num_tokens} tokens, through block {block}"
    return title, trajectories


def _plan(flow: ImageFlow, strategy: str | None, num: int, report: Report) -> Strategy:
    """The strategy that `--strategy` names, or else the report's."""
    if strategy is not None:
        return choose(flow, strategy, num, guidance=report.settings.guidance, report=report)
    if report.components is not None:
        return Strategy.from_report(report, _TOLERANCE)
    return Strategy.parse(f"Jacobi-{_most_sweeps(report)}", report)


def _draw(
    flow: ImageFlow, report: Report, plan: Strategy, draw: Callable[..., Samples], rate: float
) -> tuple[dict[str, Image.Image | Figure], list[dict[str, Any]]]:
    """The pictures by name, and the figures of the samples on guesses.png; `rate` is that of denoising."""
    traced = draw(strategy="sequential", denoise=rate, return_trace=True)
    steps = traced.trace or ()
    exact = steps[-2] if rate else traced.images
    rows = [_row(name, draw(strategy=choice), exact) for name, choice in _choices(report, plan).items()]
    compared = draw(strategy=plan, denoise=rate)
    columns = [] if traced.labels is None else [f"class {label}" for label in traced.labels.tolist()]
    pictures: dict[str, Image.Image | Figure] = {
        "convergence.png": convergence_figure(report),
        "sampling.png": trace_sheet([images[:4] for images in steps], rate > 0),
        "guesses.png": rows_sheet(
            [(row["caption"], row.pop("images")) for row in rows] + [("sequential", exact)], columns=columns
        ),
        "comparison.png": comparison_sheet(
            traced.images, compared.images, ("sequential", str(plan)), columns=columns
        ),
    }  # fmt: skip
    if report.segment_traces:
        pictures["segments.png"] = segments_figure(report)
    return pictures, rows


def _most_sweeps(report: Report) -> int:
    """What the slowest block takes; 1 where even its guess is within the tolerance."""
    return max(1, *report.slowest_sweeps("noise", _TOLERANCE))


def _choices(report: Report, plan: Strategy) -> dict[str, Strategy]:
    """Guesses and sweeps to compare: every guess at a third of the sweeps that the slowest block takes, then more."""
    most = _most_sweeps(report)
    few, more = max(1, most // 3), max(1, 2 * most // 3)
    by_igm = {f"guess by IGM, Jacobi-{j}": Strategy.parse(f"Jacobi-{j}", report) for j in (few, more, most)}
    return {
        f"guess 0, Jacobi-{few}": Strategy.uniform(Solver(Whole(), Zeros(), MaxSweeps(few)), report.num_blocks),
        f"guess z, Jacobi-{few}": Strategy.uniform(Solver(Whole(), Latent(), MaxSweeps(few)), report.num_blocks),
        **by_igm,
        f"guess by IGM, {plan}": plan,
    }


def _row(name: str, drawn: Samples, exact: Tensor) -> dict[str, Any]:
    error = (drawn.images - exact).abs()
    figures = {"name": name, "max_error": float(error.max()), "mean_error": float(error.mean())}
    caption = f"{name}: error max {figures['max_error']:.1e}, mean {figures['mean_error']:.1e}"
    return {"caption": caption, "images": drawn.images, **figures}
