"""`jacobiflow calibrate`: which blocks are tough, where to start, how long to sweep."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.calibration import Report
from jacobiflow.calibration import calibrate as measure
from jacobiflow.calibration.convergence import TOLERANCES
from jacobiflow.calibration.report import GUESS_NAMES
from jacobiflow.calibration.tuning import BlockTuning
from jacobiflow.cli import options, pages, paths
from jacobiflow.cli.settings import guidance_words
from jacobiflow.cli.tables import show
from jacobiflow.data import ImageDataset, Noise, noisy_images
from jacobiflow.errors import InputValueError
from jacobiflow.flows.folder import REPORTS
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.guidance import Guidance
from jacobiflow.measuring import machine
from jacobiflow.plots import Picture, Table, convergence_figure, segments_figure
from jacobiflow.strategy import Strategy

_SHOWN = 1e-3  # the tolerance whose sweeps the tables show
_NAMES = tuple(name.replace("_", " ") for name in GUESS_NAMES)
_PURPOSE = (
    "These figures help to choose a strategy. They promise nothing about a sample, whose certificate is measured when "
    "it is drawn."
)
_PROPOSED = "The paper's strategies: fixed numbers of sweeps, not certified"


def calibrate(
    context: typer.Context,
    images: options.Images,
    out: Annotated[Path, typer.Option("--out", help="File for the report (JSON).")],
    model: options.Model = "fashion-p2",
    num: Annotated[
        int, typer.Option("--num", help="How many images, drawn by the seed; all where there are fewer.")
    ] = 512,
    clean: Annotated[
        bool,
        typer.Option("--clean", help="Images without the noise of the flow's training, as the paper's code has it."),
    ] = False,
    unconditional: Annotated[bool, typer.Option("--unconditional", help="Do not use the images' labels.")] = False,
    norm: Annotated[str, typer.Option("--norm", help="Norm of IGM and CRM: 2 (spectral), fro, 1.")] = "2",
    segments: Annotated[
        int, typer.Option("--segments", help="Segments of a tough block, with metrics of their own.")
    ] = 8,
    traced: Annotated[int, typer.Option("--traced", help="Images, and fresh latents, whose sweeps are measured.")] = 32,
    per_class: Annotated[bool, typer.Option("--per-class", help="Also each class by itself (Appendix E).")] = False,
    chord: Annotated[
        bool,
        typer.Option(
            "--chord",
            help="Also fit guesses and corrections, and count their sweeps, for jacobiflow plan. With --out "
            f"{' or '.join(REPORTS)} in the model's folder, the strategy auto plans by it, under the same guidance.",
        ),
    ] = False,
    guidance: options.GuidanceWeight = 0.0,
    guidance_on: options.GuidanceOn = "both",
    constant_guidance: options.ConstantGuidance = False,
    attn_temperature: options.AttnTemperature = 1.0,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images in memory at a time.")] = 64,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    json: options.Json = None,
    html: options.Html = None,
) -> None:
    """Measure a flow's blocks: the metrics IGM and CRM, the sweeps they really need, and a strategy from both.

    The same command again goes on where it was interrupted; what is finished is in OUT.partial until then.

    Example: jacobiflow calibrate --per-class --images fashion-512 --out out/report.json --html page.html
    """
    paths.check(json, out_file=out, html=html, calibrates=True, model=model, images=images)
    if norm not in ("2", "fro", "1"):
        raise InputValueError(f"--norm {norm}: give 2, fro or 1")
    if num < 2:
        raise InputValueError(f"--num {num}: give at least 2 images, to take means over")
    flow = options.load_model(model, device, dtype)
    data = options.read_images(images, flow.config.image_size, flow.config.in_channels)
    chosen = _choose(len(data), num, seed)
    labels = None if unconditional or data.labels is None or not flow.config.num_classes else data.labels[chosen]
    if labels is not None and labels.max() >= flow.config.num_classes:
        have, takes = int(labels.max()) + 1, flow.config.num_classes
        raise InputValueError(
            f"--images {images}: {have} classes, the model has {takes}; give its own, or --unconditional"
        )
    if per_class and labels is None:
        raise InputValueError("--per-class: needs a model with classes and labelled images, without --unconditional")
    guide = options.parse_guidance(guidance, guidance_on, constant_guidance, attn_temperature)
    started = perf_counter()
    report = measure(
        flow, _Images(data, chosen, None if clean else _noise(flow.config.noise_std), seed), labels,
        norm="fro" if norm == "fro" else 2 if norm == "2" else 1,
        guidance=guide,
        segments=segments, traced=traced, per_class=per_class, chord=chord, batch_size=batch_size, seed=seed,
        progress=sys.stderr.isatty(), out=out,
    )  # fmt: skip
    figures = _figures(report) | {
        "model": model, "images": images, "clean": clean, "report": str(out),
        "machine": machine(flow.var.device), "seconds": perf_counter() - started,  # of this run, if it was interrupted
    }  # fmt: skip
    options.report(json, figures)
    use = _use_it(flow, model, out, guide, unconditional=flow.config.num_classes > 0 and labels is None)
    said, tables = _said(report), _tables(report, figures)
    if html is not None:
        rows = [(tolerance, notation) for tolerance, notation in (figures["proposed"] or {}).items()]
        proposed = [Table(_PROPOSED, ("tolerance", "strategy"), rows, (1,), use)] * bool(rows)
        pages.write(
            html, context, flow, f"Calibration of {model}", f"{'; '.join(said)}. {_PURPOSE}", figures,
            [*tables, *proposed], _pictures(report),
        )  # fmt: skip
    print(*said, "", sep="\n")
    for table in tables:
        show(table)
        print()
    if figures["proposed"]:
        print(f"{_PROPOSED}:")
    for tolerance, notation in (figures["proposed"] or {}).items():
        print(f"proposed to {tolerance}: {notation}")
    print(f"wrote {out}", use, sep="\n")


class _Images:
    """Images of a data set with their noise, made on access."""

    def __init__(self, data: ImageDataset, chosen: Int[Tensor, " n"], noise: Noise | None, seed: int) -> None:
        self.data, self.chosen, self.noise, self.seed = data, chosen, noise, seed

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: Int[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        if self.noise is None:
            return self.data.batch(self.chosen[index])[0]
        return noisy_images(self.data, self.chosen[index], self.noise, self.seed)


def _choose(available: int, num: int, seed: int) -> Int[Tensor, " n"]:
    if num >= available:
        return torch.arange(available)
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:num].sort().values


def _noise(std: float) -> Noise:
    return Noise("gaussian", std) if std else Noise("uniform")


def _figures(report: Report) -> dict[str, Any]:
    """The numbers of the tables."""
    defined = report.components is not None
    starts = tuple(report.traces)
    return {
        "num_images": report.settings.num_images,
        "norm": report.settings.norm,
        "igm": report.igm,
        "guess": [report.best_guess(block) for block in range(report.num_blocks)],
        "components": [part._asdict() for part in report.components] if report.components else None,
        "crm": report.crm if defined else None,
        "crm_percent": report.crm_percent if defined else None,
        "tough_blocks": report.tough_blocks if defined else None,
        "gamma": [sum(norms) / len(norms) for norms in report.gamma],
        "mean_sweeps": {
            start: {guess: {f"{t:g}": report.mean_sweeps(start, t, guess) for t in TOLERANCES} for guess in GUESS_NAMES}
            for start in starts
        },
        "rank_correlation": {
            metric: {s: {f"{t:g}": report.rank_correlation(metric, s, t) for t in TOLERANCES} for s in starts}
            for metric in (("crm", "gamma") if defined else ("gamma",))
        },
        "classes": [asdict(row) for row in report.class_spread()] if report.class_metrics else None,
        "proposed": {f"{t:g}": str(Strategy.from_report(report, t)) for t in TOLERANCES} if defined else None,
    }  # fmt: skip


def _use_it(flow: ImageFlow, model: str, report: Path, guidance: Guidance | None, unconditional: bool) -> str:
    """The command line that samples by a plan made with the report, each sample certified."""
    words = ["jacobiflow", "sample", "--model", model, "--report", str(report)]
    words += [*["--labels", "none"] * unconditional, *guidance_words(flow, guidance)]
    return f"use it: {shlex.join(words)}"


def _said(report: Report) -> tuple[str, str]:
    guided = " (guided)" if report.settings.guidance else ""
    of = f"mean of {report.settings.traced} fresh latents"
    return f"{report.settings.num_images} images{guided}", f"sweeps: until within {_SHOWN:g} of the solution, {of}"


def _shown(value: float) -> str:
    return f"{value:.1e}" if 1e4 <= value < float("inf") else f"{value:.2f}"


def _tables(report: Report, figures: dict[str, Any]) -> list[Table]:
    """What is printed, and what the page shows."""
    tables = [_starts(report, figures), _tough(report, figures)]
    if report.class_metrics:
        tables.append(_classes(report))
    if report.tuning is not None:
        fitted = [(str(i), *_fitted(block, report.num_tokens)) for i, block in enumerate(report.tuning.blocks)]
        columns = ("block", "correction", "mean", "slowest", "error over\nresidual", "error of\nimage over it")
        title = f"With a fitted guess and correction: sweeps of all tokens to {_SHOWN:g}"
        tables.append(Table(title, columns, fitted, words=(1,)))
    return tables


def _starts(report: Report, figures: dict[str, Any]) -> Table:
    sweeps = figures["mean_sweeps"]["noise"]
    return Table(
        "Where to start: IGM, and sweeps from there",
        ("block", *(f"IGM\n{name}" for name in _NAMES), *(f"sweeps\n{name}" for name in _NAMES), "guess"),
        [
            (
                str(i), *(_shown(row[name]) for name in GUESS_NAMES),
                *(f"{sweeps[name][f'{_SHOWN:g}'][i]:.1f}" for name in GUESS_NAMES),
                figures["guess"][i].replace("_", " "),
            )
            for i, row in enumerate(report.igm)
        ],
        words=(7,),
    )  # fmt: skip


def _tough(report: Report, figures: dict[str, Any]) -> Table:
    sweeps = report.mean_sweeps("noise", _SHOWN)
    note = [
        f"rank correlation of {metric} with the sweeps: {by_start['noise'][f'{_SHOWN:g}']:.2f}"
        for metric, by_start in figures["rank_correlation"].items()
    ]
    if report.components is None:
        note = ["CRM is not defined: the flow's scale and shift do not end in a linear layer", *note]
        rows = [(str(i), f"{sweeps[i]:.1f}", _shown(norm)) for i, norm in enumerate(figures["gamma"])]
        return Table("Which blocks are tough", ("block", "sweeps", "|Gamma|"), rows, (), "\n".join(note))
    return Table(
        "Which blocks are tough: CRM, and what it stands for",
        ("block", "|S^-1 X|", "|W_s|", "|W_u|", "CRM", "percent", "tough", "sweeps", "|Gamma|"),
        [
            (
                str(i), *(_shown(value) for value in part), _shown(report.crm[i]), f"{report.crm_percent[i]:.2f}",
                "yes" if i in report.tough_blocks else "", f"{sweeps[i]:.1f}", _shown(figures["gamma"][i]),
            )
            for i, part in enumerate(report.components)
        ],
        words=(), note="\n".join(note),
    )  # fmt: skip


def _fitted(block: BlockTuning, num_tokens: int) -> tuple[str, ...]:
    whole = [run for run in block.runs if run.partition.stop(0, num_tokens) == num_tokens and not run.coarse]
    run = next(run for run in whole if run.tolerance == _SHOWN)
    return (
        type(block.correction).__name__.lower(), f"{sum(run.sweeps) / len(run.sweeps):.1f}", str(max(run.sweeps)),
        _shown(run.error / run.residual) if run.residual else "", _shown(block.amplification),
    )  # fmt: skip


def _classes(report: Report) -> Table:
    def shown(spread: Any) -> str:
        return "" if spread is None else f"{_shown(spread.mean)}±{_shown(spread.std)}"

    return Table(
        f"Over {len(report.class_metrics)} classes: mean ± standard deviation, and how often a guess wins",
        ("block", "CRM rank", "percent", *(f"IGM\n{name}" for name in _NAMES), "wins"),
        [
            (
                str(i), shown(row.rank), shown(row.percent), *(shown(row.igm[name]) for name in GUESS_NAMES),
                "/".join(str(row.wins[name]) for name in GUESS_NAMES),
            )
            for i, row in enumerate(report.class_spread())
        ],
        words=(),
    )  # fmt: skip


def _pictures(report: Report) -> list[Picture]:
    found = [Picture("Distance to the solution by sweep, from each block's best guess", convergence_figure(report))]
    if report.segment_traces:
        found.append(Picture("The same in the segments of the tough blocks, one by one", segments_figure(report)))
    return found
