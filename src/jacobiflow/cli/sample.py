"""`jacobiflow sample`: draw images."""

from __future__ import annotations

import io
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jacobiflow import sampling
from jacobiflow.benchmarking import machine
from jacobiflow.cli import options
from jacobiflow.data import quantize
from jacobiflow.files import write_atomically
from jacobiflow.plots import comparison_sheet, image_grid, save_png
from jacobiflow.sampling import Samples
from jacobiflow.solvers import Status
from jacobiflow.strategy import Strategy, resolve
from jacobiflow.strategy import plan as make_plan
from jacobiflow.strategy.notation import DEFAULT_TOLERANCE


def sample(
    model: options.Model = "fashion-p2",
    num: Annotated[int, typer.Option("--num", help="How many images.")] = 16,
    labels: options.Labels = "balanced",
    seed: options.Seed = 0,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Images solved together; default: all.")
    ] = None,
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy",
            help="auto (planned for this model, machine and batch size; see jacobiflow plan), sequential, jacobi, "
            "jacobi-J, gs-jacobi:G, gs-jacobi:G-J, window:N, the paper's [Stack-GS-J-Else], or a .json file.",
        ),
    ] = "auto",
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", help="Largest residual |g(x) - x| in any block; default 1e-3, or the file's own."),
    ] = None,
    report: options.ReportFile = None,
    guidance: options.GuidanceWeight = 0.0,
    guidance_on: options.GuidanceOn = "both",
    constant_guidance: options.ConstantGuidance = False,
    attn_temperature: options.AttnTemperature = 1.0,
    denoise: Annotated[
        float, typer.Option("--denoise", help="Rate of one denoising step; 0 is off, 1 the norm.")
    ] = 0.0,
    certify: Annotated[
        bool, typer.Option(help="Measure every sample's residual in every block, and mend what is above the tolerance.")
    ] = True,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also sample by the sequential loop at the same latents, and compare.")
    ] = False,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    out: Annotated[Path, typer.Option("--out", help="Folder for samples.png, samples.npz.")] = Path("out/samples"),
    json: options.Json = None,
) -> None:
    """Draw images from a flow, in parallel, each certified to a tolerance.

    Example: jacobiflow sample --model fashion-p2 --num 20 --compare --out out/demo
    """
    if num < 1:
        raise ValueError(f"--num {num}: give a positive number of images")
    flow = options.load_model(model, device, dtype)
    classes = options.parse_labels(labels, num, flow, seed)
    guide = options.parse_guidance(guidance, guidance_on, constant_guidance, attn_temperature)
    plan: str | Strategy = strategy
    if report is not None:
        if strategy.endswith(".json"):
            raise ValueError(
                f"--report {report}: the strategy in {strategy} has its own guesses; leave one of them out"
            )
        found = options.load_report(report, flow)
        if found.settings.guidance != guide:
            warnings.warn(f"--report {report}: calibrated under other guidance; it may start far off", stacklevel=2)
        if strategy == "auto":
            given = DEFAULT_TOLERANCE if tolerance is None else tolerance
            plan = make_plan(flow, found, batch_size or num, given, guidance=guide)
        else:
            plan = Strategy.parse(strategy, found)
    options.check_writable(out, json)

    def draw(strategy: str | Strategy, count: int = num, tolerance: float | None = tolerance) -> Samples:
        return sampling.sample(
            flow, num=count, labels=None if classes is None else classes[:count], seed=seed, strategy=strategy,
            guidance=guide, denoise=denoise, tolerance=tolerance, certify=certify,
            batch_size=batch_size, progress=sys.stderr.isatty(),
        )  # fmt: skip

    if compare:
        if plan != "auto":  # refuse what does not fit before the long sequential run
            resolve(plan, flow.config.num_blocks, flow.config.num_tokens, tolerance)
        draw("jacobi-2", min(num, batch_size or num), None)  # so that neither run pays for first use
        results = {"sequential": draw("sequential")}
    else:
        results = {}
    results[strategy] = draw(plan)
    drawn = results[strategy]
    figures = {
        "model": model, "num": num, "batch_size": batch_size or num, "seed": seed, "strategy": strategy,
        "guidance": guidance, "denoise": denoise, **machine(flow.var.device),
        "runs": {name: _figures(result) for name, result in results.items()},
    }  # fmt: skip
    zoom = max(2, 64 // flow.config.image_size)
    if compare:
        exact = results["sequential"].images
        lost = drawn.images.isnan() & exact.isnan()
        error = (drawn.images - exact).abs().masked_fill(lost, 0).nan_to_num(nan=torch.inf)
        figures["error"] = {"max": float(error.max()), "mean": float(error.mean())}
        sheet = comparison_sheet(exact, drawn.images, ("sequential", strategy), zoom)
    else:
        sheet = image_grid(drawn.images, min(10, num), zoom)
    out.mkdir(parents=True, exist_ok=True)
    save_png(sheet, out / "samples.png")
    _save_npz(drawn, out / "samples.npz")
    options.report(json, figures)
    _print(figures, out)


def _figures(result: Samples) -> dict[str, Any]:
    status = result.status
    return {
        "seconds": result.seconds,
        "denoise_seconds": result.denoise_seconds,
        "images_per_second": len(result.images) / result.seconds,
        "network_calls": result.network_calls,
        "token_evaluations": result.token_evaluations,
        "certificate": None if result.certificate is None else float(result.certificate.max()),
        "status": {state.name.lower(): int((status == state).sum()) for state in Status},
        "resolved_sequentially": result.resolved_sequentially,
        "sweeps": [block.sweeps for block in result.stats],
        "block_seconds": [block.seconds for block in result.stats],
    }


def _save_npz(result: Samples, path: Path) -> None:
    pixels = quantize(result.images.nan_to_num(nan=-1.0)).permute(0, 2, 3, 1).cpu().numpy()
    arrays: dict[str, Any] = {"arr_0": pixels}
    if result.labels is not None:
        arrays["labels"] = result.labels.cpu().numpy()
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)
    write_atomically(path, data.getvalue())


def _print(figures: dict[str, Any], out: Path) -> None:
    console = Console()
    num, batch_size = figures["num"], figures["batch_size"]
    print(f"{figures['model']}: {num} image{'s' * (num > 1)}, batch size {batch_size}")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("strategy", overflow="fold")
    for column in ("seconds", "images/s", "network\ncalls", "token\nevaluations", "certificate", "re-solved"):
        table.add_column(column, justify="right", min_width=max(map(len, column.split())))
    for name, run in figures["runs"].items():
        certificate = "not asked" if run["certificate"] is None else f"{run['certificate']:.1e}"
        table.add_row(
            escape(name), f"{run['seconds']:.3f}", f"{run['images_per_second']:.1f}",
            f"{run['network_calls']:,}", f"{run['token_evaluations']:,}", certificate,
            str(run["resolved_sequentially"]),
        )  # fmt: skip
    console.print(table)
    if "error" in figures:
        sequential, parallel = (figures["runs"][name]["seconds"] for name in ("sequential", figures["strategy"]))
        print(
            f"speed-up {sequential / parallel:.2f}x over the sequential loop; "
            f"error max {figures['error']['max']:.1e}, mean {figures['error']['mean']:.1e}"
        )
    print(f"wrote {out / 'samples.png'} and {out / 'samples.npz'}")
