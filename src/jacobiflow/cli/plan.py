"""`jacobiflow plan`: the cheapest way to solve every block on this machine."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from jacobiflow.calibration import find_report
from jacobiflow.cli import options, paths
from jacobiflow.cli.settings import guidance_words
from jacobiflow.errors import InputValueError
from jacobiflow.flows.folder import REPORT
from jacobiflow.solvers import Solver
from jacobiflow.strategy import plan as make
from jacobiflow.strategy.memory import batch_bytes, fitting_batch
from jacobiflow.strategy.notation import DEFAULT_TOLERANCE

_MOST = 1024  # images in a batch that is chosen


def plan(
    out: Annotated[Path, typer.Option("--out", help="File for the strategy (JSON).")],
    model: options.Model = "fashion-p2",
    report: Annotated[
        Path | None,
        typer.Option(
            "--report", help="By jacobiflow calibrate --chord; default: the one of this guidance in the model's folder."
        ),
    ] = None,
    batch_size: Annotated[
        str,
        typer.Option(
            "--batch-size",
            help="Images solved together, or auto: as many as fit in free memory, at most 1,024.",
        ),
    ] = "1",
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Largest residual in any block, and largest error of an image.")
    ] = DEFAULT_TOLERANCE,
    guidance: options.GuidanceWeight = 0.0,
    guidance_on: options.GuidanceOn = "both",
    constant_guidance: options.ConstantGuidance = False,
    attn_temperature: options.AttnTemperature = 1.0,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    json: options.Json = None,
) -> None:
    """Time sweeps on this machine, and find the cheapest strategy for a model, a batch size and a tolerance.

    What the strategy "auto" does by itself, as a file to look at, to keep and to give to sample.

    Example: jacobiflow plan --model fashion-p2 --batch-size 4 --out out/plan.json
    """
    paths.check(json, out_file=out, model=model, report=report)
    size = options.parse_batch_size(batch_size)
    if out.suffix != ".json":
        raise InputValueError(f"--out {out}: give a file that ends in .json")
    flow = options.load_model(model, device, dtype)
    guide = options.parse_guidance(guidance, guidance_on, constant_guidance, attn_temperature)
    path = report or find_report(flow, guide)
    if path is None:
        raise InputValueError(f"--model {model}: has no {REPORT}; give --report, by jacobiflow calibrate --chord")
    size = size or fitting_batch(flow, _MOST, guide)
    found = make(flow, options.load_report(path, flow), size, tolerance, guidance=guide)
    prediction = found.prediction
    assert prediction is not None  # plan makes it
    with paths.making(out.parent):
        found.save(out)
    options.report(json, found.to_json() | {"model": model, "report": str(path)})

    print(f"{model}, batch size {size}, {prediction.device}")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for column in ("block", "tokens at a time", "until"):
        table.add_column(column)
    for i, solver in enumerate(found.solvers):
        table.add_row(str(i), *_words(solver, flow.config.num_tokens))
    Console().print(table)
    print(
        f"predicted: {prediction.seconds:.3f} s a batch, the sequential loop {prediction.sequential_seconds:.3f} s; "
        f"largest error of an image {prediction.error:.1e}"
    )
    options.print_memory(batch_bytes(flow, size, guide))
    print(f"wrote {out}")
    words = ["jacobiflow", "sample", "--model", model, "--strategy", str(out), "--batch-size", str(size)]
    words += ["--num", str(size), *guidance_words(flow, guide)]
    print(f"use it: {shlex.join(words)}")


def _words(solver: Solver, num_tokens: int) -> tuple[str, str]:
    tokens = str(solver.partition.stop(0, num_tokens))
    if tokens == "1":
        return tokens, "exact"
    coarse = f"{solver.coarse} sweeps in bfloat16, then " if solver.coarse else ""
    if solver.stopping.atol is not None:
        return tokens, f"{coarse}changes are below {solver.stopping.atol:.1e}"
    return tokens, f"{coarse}{solver.stopping.max_sweeps} sweeps"
