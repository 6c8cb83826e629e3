"""`jacobiflow calibrate`: metrics of blocks, and the sweeps that they need."""

from __future__ import annotations

import shlex
from dataclasses import astuple
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Option

import jacobiflow as jf
from jacobiflow.cli import loading, options, output_files
from jacobiflow.cli.output import progress_bar, show_table
from jacobiflow.errors import InputValueError

_TOLERANCE = 1e-3  # The tables count sweeps to this tolerance.


def calibrate(
    images: options.Images,
    out: Annotated[Path, Option(help="File for the report (JSON).")],
    model: options.Model = "fashion-p2",
    num: Annotated[int, Option(min=2, help="Number of images, chosen by the seed; all if there are fewer.")] = 512,
    clean: Annotated[
        bool, Option("--clean", help="Add no training noise to the images, as the paper's code does.")
    ] = False,
    unconditional: Annotated[bool, Option("--unconditional", help="Do not use the images' labels.")] = False,
    norm: Annotated[Literal["2", "fro", "1"], Option(help="Norm of IGM and CRM; 2 is the spectral one.")] = "2",
    segments: Annotated[int, Option(min=1, help="Number of segments of a tough block, each with its metrics.")] = 8,
    convergence_samples: Annotated[int, Option(min=1, help="Number of samples in each convergence curve.")] = 32,
    per_class: Annotated[bool, Option("--per-class", help="Also measure each class by itself (Appendix E).")] = False,
    guidance: options.Guidance = "0",
    batch_size: options.NetworkBatchSize = 64,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
) -> dict[str, Any]:
    """Measure a flow's blocks, as the paper does.

    Measures the metrics IGM and CRM and the sweeps that the blocks need, and derives a strategy. The same command again
    resumes after an interruption, from the results in OUT.partial.

    Example: jacobiflow calibrate --per-class --images fashion-512 --out out/report.json
    """
    import torch

    from jacobiflow.data import load_images, noisy_images

    output_files.check_output("--out", out, model, images, replaces="report*.json")
    flow = loading.load_model(model, device, dtype, guidance)
    is_labelled = bool(flow.config.num_classes) and not unconditional
    if per_class and not is_labelled:
        remedy = "leave out --unconditional" if unconditional else "this model has no classes; leave it out"
        raise InputValueError(f"--per-class: {remedy}")
    data = load_images(images, *loading.image_size(flow))
    indices = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:num].sort().values
    pixels, labels = data.batch(indices)
    if not clean:
        pixels = noisy_images(data, indices, loading.training_noise(flow), seed)
    labels = labels if is_labelled else None
    with progress_bar() as progress:
        report = jf.calibrate(
            flow, pixels, labels, norm="fro" if norm == "fro" else 2 if norm == "2" else 1,
            segments=segments, num_convergence_samples=convergence_samples, per_class=per_class, batch_size=batch_size,
            seed=seed, out=out, progress=progress,
        )  # fmt: skip
    _print_report(report)
    use = ["jacobiflow", "sample", "--model", model, "--report", str(out), "--guidance", str(flow.guidance or 0)]
    use += ["--labels", "none"] * (labels is None)
    print(f"wrote {out}\nuse it: {shlex.join(use)}")
    results: dict[str, Any] = {"model": model, "images": images, "report": str(out), "igm": report.igm}
    if report.components is not None:
        results |= {"crm": report.crm, "tough_blocks": report.tough_blocks}
    return results | {"mean_sweeps": report.mean_sweeps("noise", _TOLERANCE)}


def _print_report(report: jf.CalibrationReport) -> None:
    """Prints tables of the metrics and sweeps of the blocks, and the paper's strategies."""
    from jacobiflow.calibration import gs_jacobi_notation
    from jacobiflow.calibration.convergence import TOLERANCES
    from jacobiflow.calibration.report import GUESS_NAMES

    blocks, is_defined = range(report.num_blocks), report.components is not None
    names = {guess: guess.replace("_", " ") for guess in GUESS_NAMES}
    print(f"{report.settings.num_images} images{' (guided)' if report.settings.guidance else ''}")
    num_samples = report.settings.num_convergence_samples
    print(f"sweeps: until within {_TOLERANCE:g} of the solution, mean of {num_samples} fresh latents\n")

    print("Where to start: IGM, and sweeps from there")
    columns: dict[str, Any] = {"block": map(str, blocks)}
    columns |= {f"IGM\n{name}": [_format_number(row[guess]) for row in report.igm] for guess, name in names.items()}
    for guess, name in names.items():
        columns[f"sweeps\n{name}"] = [f"{sweeps:.1f}" for sweeps in report.mean_sweeps("noise", _TOLERANCE, guess)]
    columns["guess"] = [names[report.best_guess(i)] for i in blocks]
    show_table(columns, zip(*columns.values(), strict=True), text=(7,))

    print("\nWhich blocks are tough: CRM and its parts")
    columns = {"block": map(str, blocks)}
    if report.components is not None:
        columns_of_parts = zip(*(map(_format_number, astuple(part)) for part in report.components), strict=True)
        columns |= dict(zip(("|S^-1 X|", "|W_s|", "|W_u|"), columns_of_parts, strict=True))
        columns["CRM"] = map(_format_number, report.crm)
        columns["percent"] = [f"{percent:.2f}" for percent in report.crm_percent]
        columns["tough"] = ["yes" * (i in report.tough_blocks) for i in blocks]
    columns["sweeps"] = [f"{sweeps:.1f}" for sweeps in report.mean_sweeps("noise", _TOLERANCE)]
    columns["|Gamma|"] = [_format_number(sum(norms) / len(norms)) for norms in report.gamma]
    show_table(columns, zip(*columns.values(), strict=True), text=())
    if not is_defined:
        print("CRM is not defined: the flow's scale and shift do not end in a linear layer")
    for metric in ("crm", "gamma") if is_defined else ("gamma",):
        print(f"rank correlation of {metric} with the sweeps: {report.rank_correlation(metric):.2f}")

    if report.class_metrics:
        print(f"\nOver {len(report.class_metrics)} classes: mean ± standard deviation, and how often a guess wins")
        spreads = report.class_spread()
        columns = {"block": map(str, blocks)}
        columns |= {"CRM rank": [_format_spread(row.crm_rank) for row in spreads]}
        columns |= {"percent": [_format_spread(row.crm_percent) for row in spreads]}
        columns |= {
            f"IGM\n{name}": [_format_spread(row.igm[guess]) for row in spreads] for guess, name in names.items()
        }
        columns["wins"] = ["/".join(str(row.num_best[guess]) for guess in names) for row in spreads]
        show_table(columns, zip(*columns.values(), strict=True), text=())

    if is_defined:
        print("\nThe paper's strategies: fixed numbers of sweeps, not certified")
        for tolerance in TOLERANCES:
            print(f"to {tolerance:g}: {gs_jacobi_notation(report, tolerance)}")


def _format_number(value: float) -> str:
    return f"{value:.1e}" if 1e4 <= value < float("inf") else f"{value:.2f}"


def _format_spread(spread: tuple[float, float] | None) -> str:
    return "" if spread is None else "±".join(map(_format_number, spread))
