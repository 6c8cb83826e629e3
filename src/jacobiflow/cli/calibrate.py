"""`jacobiflow calibrate`: which blocks are tough, where to start, how long to sweep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jacobiflow.cli import options
from jacobiflow.cli.screen import Table, progress_bar, show
from jacobiflow.errors import InputValueError

if TYPE_CHECKING:
    from torch import Tensor

    from jacobiflow.calibration import Report
    from jacobiflow.data import ImageDataset, Noise
    from jacobiflow.flows.guidance import Guidance
    from jacobiflow.flows.image_flow import ImageFlow

_SHOWN = 1e-3  # the tolerance whose sweeps the tables show
_GUESSES = ("latent", "zeros", "mean_affine")  # as jacobiflow.calibration.report.GUESS_NAMES has them
_NAMES = tuple(name.replace("_", " ") for name in _GUESSES)
_PROPOSED = "The paper's strategies: fixed numbers of sweeps, not certified"


def calibrate(
    images: options.Images,
    out: Annotated[Path, typer.Option("--out", help="File for the report (JSON).")],
    model: options.Model = "fashion-p2",
    num: Annotated[int, typer.Option("--num", min=2, help="Images, drawn by the seed; all if there are fewer.")] = 512,
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
    guidance: options.Guidance = "0",
    batch_size: options.ImagesAtATime = 64,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    json: options.Json = None,
) -> None:
    """Measure a flow's blocks, as the paper does.

    The metrics IGM and CRM, the sweeps that the blocks need, and a strategy from both. The same command again goes on
    after an interruption; what is finished is in OUT.partial until then.

    Example: jacobiflow calibrate --per-class --images fashion-512 --out out/report.json
    """
    from time import perf_counter

    from jacobiflow.calibration import calibrate as measure
    from jacobiflow.data import load_images
    from jacobiflow.measuring import machine

    options.check_files(model, [images], out=out, json=json)
    if norm not in ("2", "fro", "1"):
        raise InputValueError(f"--norm {norm}: give 2, fro or 1")
    flow = options.load_model(model, device, dtype)
    data = load_images(images, flow.config.image_size, flow.config.in_channels)
    indices = _choose(len(data), num, seed)
    labels = None if unconditional or data.labels is None or not flow.config.num_classes else data.labels[indices]
    if labels is not None and labels.max() >= flow.config.num_classes:
        have, takes = int(labels.max()) + 1, flow.config.num_classes
        raise InputValueError(
            f"--images {images}: {have} classes, the model has {takes}; give its own, or --unconditional"
        )
    if per_class and labels is None:
        raise InputValueError("--per-class: needs a model with classes and labelled images, without --unconditional")
    guide = options.parse_guidance(guidance)
    started = perf_counter()
    with progress_bar() as progress:
        report = measure(
            flow.guided(guide), _Images(data, indices, None if clean else _noise(flow.config.noise_std), seed), labels,
            norm="fro" if norm == "fro" else 2 if norm == "2" else 1, segments=segments, traced=traced,
            per_class=per_class, batch_size=batch_size, seed=seed, out=out, progress=progress,
        )  # fmt: skip
    figures = _figures(report) | {
        "model": model, "images": images, "clean": clean, "report": str(out),
        "machine": machine(flow.var.device), "seconds": perf_counter() - started,  # of this run, if it was interrupted
    }  # fmt: skip
    options.write_results(json, figures)
    use = _use_it(flow, model, out, guide, unconditional=flow.config.num_classes > 0 and labels is None)
    print(*_scope(report), "", sep="\n")
    for table in _tables(report, figures):
        show(table)
        print()
    if figures["proposed"]:
        print(f"{_PROPOSED}:")
    for tolerance, notation in (figures["proposed"] or {}).items():
        print(f"proposed to {tolerance}: {notation}")
    print(f"wrote {out}", use, sep="\n")


class _Images:
    """Images of a data set with their noise, made on access."""

    def __init__(self, data: ImageDataset, indices: Tensor, noise: Noise | None, seed: int) -> None:
        self.data, self.indices, self.noise, self.seed = data, indices, noise, seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Tensor) -> Tensor:
        from jacobiflow.data import noisy_images

        if self.noise is None:
            return self.data.batch(self.indices[index])[0]
        return noisy_images(self.data, self.indices[index], self.noise, self.seed)


def _choose(available: int, num: int, seed: int) -> Tensor:
    import torch

    if num >= available:
        return torch.arange(available)
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:num].sort().values


def _noise(std: float) -> Noise:
    from jacobiflow.data import Noise

    return Noise("gaussian", std) if std else Noise("uniform")


def _figures(report: Report) -> dict[str, Any]:
    """The numbers of the tables."""
    from dataclasses import asdict

    from jacobiflow.calibration import gs_jacobi_notation
    from jacobiflow.calibration.convergence import TOLERANCES

    defined = report.components is not None
    starts = tuple(report.traces)
    return {
        "num_images": report.settings.num_images,
        "norm": report.settings.norm,
        "igm": report.igm,
        "guess": [report.best_guess(block) for block in range(report.num_blocks)],
        "components": [asdict(part) for part in report.components] if report.components else None,
        "crm": report.crm if defined else None,
        "crm_percent": report.crm_percent if defined else None,
        "tough_blocks": report.tough_blocks if defined else None,
        "gamma": [sum(norms) / len(norms) for norms in report.gamma],
        "mean_sweeps": {
            start: {guess: {f"{t:g}": report.mean_sweeps(start, t, guess) for t in TOLERANCES} for guess in _GUESSES}
            for start in starts
        },
        "rank_correlation": {
            metric: {s: {f"{t:g}": report.rank_correlation(metric, s, t) for t in TOLERANCES} for s in starts}
            for metric in (("crm", "gamma") if defined else ("gamma",))
        },
        "classes": [asdict(row) for row in report.class_spread()] if report.class_metrics else None,
        "proposed": {f"{t:g}": gs_jacobi_notation(report, t) for t in TOLERANCES} if defined else None,
    }  # fmt: skip


def _use_it(flow: ImageFlow, model: str, report: Path, guidance: Guidance | None, unconditional: bool) -> str:
    """The command line that samples by a plan made with the report, each sample certified."""
    import shlex

    words = ["jacobiflow", "sample", "--model", model, "--report", str(report)]
    words += [*["--labels", "none"] * unconditional, *options.guidance_text(flow, guidance)]
    return f"use it: {shlex.join(words)}"


def _scope(report: Report) -> tuple[str, str]:
    guided = " (guided)" if report.settings.guidance else ""
    of = f"mean of {report.settings.traced} fresh latents"
    return f"{report.settings.num_images} images{guided}", f"sweeps: until within {_SHOWN:g} of the solution, {of}"


def _number(value: float) -> str:
    return f"{value:.1e}" if 1e4 <= value < float("inf") else f"{value:.2f}"


def _tables(report: Report, figures: dict[str, Any]) -> list[Table]:
    """All tables that are printed."""
    tables = [_starts(report, figures), _tough(report, figures)]
    if report.class_metrics:
        tables.append(_classes(report))
    return tables


def _starts(report: Report, figures: dict[str, Any]) -> Table:
    sweeps = figures["mean_sweeps"]["noise"]
    return Table(
        "Where to start: IGM, and sweeps from there",
        ("block", *(f"IGM\n{name}" for name in _NAMES), *(f"sweeps\n{name}" for name in _NAMES), "guess"),
        [
            (
                str(i), *(_number(row[name]) for name in _GUESSES),
                *(f"{sweeps[name][f'{_SHOWN:g}'][i]:.1f}" for name in _GUESSES),
                figures["guess"][i].replace("_", " "),
            )
            for i, row in enumerate(report.igm)
        ],
        words=(7,),
    )  # fmt: skip


def _tough(report: Report, figures: dict[str, Any]) -> Table:
    from dataclasses import astuple

    sweeps = report.mean_sweeps("noise", _SHOWN)
    note = [
        f"rank correlation of {metric} with the sweeps: {by_start['noise'][f'{_SHOWN:g}']:.2f}"
        for metric, by_start in figures["rank_correlation"].items()
    ]
    if report.components is None:
        note = ["CRM is not defined: the flow's scale and shift do not end in a linear layer", *note]
        rows = [(str(i), f"{sweeps[i]:.1f}", _number(norm)) for i, norm in enumerate(figures["gamma"])]
        return Table("Which blocks are tough", ("block", "sweeps", "|Gamma|"), rows, (), "\n".join(note))
    return Table(
        "Which blocks are tough: CRM, and what it stands for",
        ("block", "|S^-1 X|", "|W_s|", "|W_u|", "CRM", "percent", "tough", "sweeps", "|Gamma|"),
        [
            (
                str(i), *map(_number, astuple(part)), _number(report.crm[i]), f"{report.crm_percent[i]:.2f}",
                "yes" if i in report.tough_blocks else "", f"{sweeps[i]:.1f}", _number(figures["gamma"][i]),
            )
            for i, part in enumerate(report.components)
        ],
        words=(), note="\n".join(note),
    )  # fmt: skip


def _classes(report: Report) -> Table:
    def text_of(spread: Any) -> str:
        return "" if spread is None else f"{_number(spread.mean)}±{_number(spread.std)}"

    return Table(
        f"Over {len(report.class_metrics)} classes: mean ± standard deviation, and how often a guess wins",
        ("block", "CRM rank", "percent", *(f"IGM\n{name}" for name in _NAMES), "wins"),
        [
            (
                str(i), text_of(row.rank), text_of(row.percent), *(text_of(row.igm[name]) for name in _GUESSES),
                "/".join(str(row.wins[name]) for name in _GUESSES),
            )
            for i, row in enumerate(report.class_spread())
        ],
        words=(),
    )  # fmt: skip
