"""`jacobiflow calibrate`: metrics of blocks, and the sweeps that they need."""

from __future__ import annotations

import math
import shlex
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import jacobiflow as jf
from jacobiflow.cli import loading, options
from jacobiflow.cli.output import progress_bar, show_table
from jacobiflow.errors import InputValueError
from jacobiflow.utils.provenance import Provenance

if TYPE_CHECKING:
    from jacobiflow.calibration.metrics import Norm

_METRIC_NAMES = {"crm": "CRM", "gamma": "|Gamma|"}
_TOLERANCE = 1e-3  # The tables count sweeps to this tolerance.


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(options.Config):
    """Measure how hard each block of a flow is to invert.

    Measures the metrics of the GS-Jacobi paper, IGM and CRM, and sweeps, and derives a strategy. The same command again
    resumes after an interruption. Several processes that run it share the work.

    Example: jacobiflow calibrate --per-class --images fashion-512 --out out/calibration

    Attributes:
        num: Number of images, which the seed chooses; all if there are fewer.
        clean: Add no training noise to the images, as the paper's code does.
        unconditional: Do not use the images' labels.
        norm: Norm in IGM and CRM: 2 is the spectral norm.
        segments: Number of segments of a tough block that are measured one by one.
        convergence_samples: Number of samples in each convergence curve.
        per_class: Also measure each class by itself (Appendix E of the paper).
        out: Folder for report.json.
    """

    model: options.Model = "fashion-p2"
    images: options.Images
    num: Annotated[int, options.DATA, options.within(2)] = 512
    clean: Annotated[options.Flag, options.DATA] = False
    unconditional: Annotated[options.Flag, options.DATA] = False
    norm: Annotated[Literal["2", "fro", "1"], options.MEASUREMENT] = "2"
    segments: Annotated[int, options.MEASUREMENT, options.within(1)] = 8
    convergence_samples: Annotated[int, options.MEASUREMENT, options.within(1)] = 32
    per_class: Annotated[options.Flag, options.MEASUREMENT] = False
    guidance: options.Guidance = "0"
    batch_size: options.NetworkBatchSize = 64
    seed: options.Seed = 0
    device: options.Device = "auto"
    dtype: options.Dtype = "float32"
    out: Annotated[Path, options.OUTPUT]


@dataclass(frozen=True)
class CalibrateResult(Provenance):
    """A report and its file.

    Attributes:
        out: The file of the report.
        use: The command that samples with the report.
    """

    model: str
    images: str
    out: str
    use: str
    report: jf.CalibrationReport

    def to_json(self) -> dict[str, Any]:
        """Returns the metrics in place of the report, which has a file of its own."""
        metrics: dict[str, Any] = {"igm": self.report.igm}
        if self.report.components is not None:
            metrics |= {"crm": self.report.crm, "tough_blocks": self.report.tough_blocks}
        return vars(self) | metrics | {"mean_sweeps": self.report.mean_sweeps("noise", _TOLERANCE), "report": self.out}


def run(config: CalibrateConfig) -> CalibrateResult | None:
    """Measures the flow, and writes the report."""
    import torch

    from jacobiflow import jobs
    from jacobiflow.calibration.measure import CalibrationJob
    from jacobiflow.data import Noise, load_images, noisy_images
    from jacobiflow.jobs.launch import find_launch, local_device
    from jacobiflow.utils import files

    files.check_own(config.out, CalibrationJob.kind)
    device = local_device(loading.pick_device(config.device))
    flow = loading.load_model(config.model, device, config.dtype, config.guidance)
    is_labelled = bool(flow.config.num_classes) and not config.unconditional
    if config.per_class and not is_labelled:
        remedy = "leave out --unconditional" if config.unconditional else "this model has no classes; leave it out"
        raise InputValueError(f"--per-class: {remedy}")
    data = load_images(config.images, *loading.image_size(flow))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(config.seed))
    indices = order[: config.num].sort().values
    pixels, labels = data.batch(indices)
    if not config.clean:
        pixels = noisy_images(data, indices, Noise(flow.config.noise_std), config.seed)
    labels = labels if is_labelled else None
    norm: Norm = 2 if config.norm == "2" else 1 if config.norm == "1" else "fro"
    job = CalibrationJob(
        flow, pixels, labels, norm, segments=config.segments, num_convergence_samples=config.convergence_samples,
        per_class=config.per_class, batch_size=config.batch_size, seed=config.seed,
    )  # fmt: skip
    out = config.out / CalibrationJob.result_name
    with progress_bar(is_shown=find_launch().rank == 0) as progress:
        completed = jobs.run(job, config.out, progress=progress)
    if not completed.should_print:
        print(f"another process wrote {out}")
        return None
    use = ["jacobiflow", "sample", "--model", config.model, "--strategy", "jacobi", "--report", str(out)]
    use += ["--guidance", str(flow.guidance or 0)] + ["--labels", "none"] * (labels is None)
    return CalibrateResult(
        model=config.model, images=config.images, out=str(out), use=shlex.join(use), machine=dict(job.machine),
        report=jf.CalibrationReport.from_json(completed.result),
    )  # fmt: skip


def show(config: CalibrateConfig, result: CalibrateResult) -> None:
    """Prints the report, and how to use it."""
    _print_report(result.report)
    print(f"wrote {result.out}\nuse it: {result.use}")


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
        print("CRM is not defined: no `output_weights`, or the scale and shift do not end in a linear layer")
    for metric in ("crm", "gamma") if is_defined else ("gamma",):
        correlation = report.rank_correlation(metric)
        text = "not defined, since all blocks are alike" if math.isnan(correlation) else f"{correlation:.2f}"
        print(f"rank correlation of {_METRIC_NAMES[metric]} with the sweeps: {text}")

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


def describe_kept(config: CalibrateConfig) -> str:
    """Describes what an interrupted run leaves, and how to go on."""
    return f"finished measurements are kept in {config.out}; run the same command to resume"
