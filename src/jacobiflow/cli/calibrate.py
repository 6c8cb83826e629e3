"""`jacobiflow calibrate`: metrics of blocks, and the sweeps that they need."""

from __future__ import annotations

import shlex
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import jacobiflow as jf
from jacobiflow.cli import loading, options
from jacobiflow.cli.output import run_job, show_table
from jacobiflow.utils.provenance import Provenance

_TOLERANCE = 1e-3  # The tables count sweeps to this tolerance.
# Columns of the tables; those of guesses are in the order of `GUESSES`.
_IGM = ("IGM\nlatent", "IGM\nzeros")
_SWEEPS = ("sweeps\nlatent", "sweeps\nzeros")
_CRM = ("block", "|S^-1 X|", "|W_s|", "|W_u|", "CRM", "percent", "tough", "sweeps", "|Gamma|")


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(options.Config):
    """Measure how hard each block of a flow is to invert.

    Measures sweeps and the metrics of the GS-Jacobi paper, IGM and CRM, and derives a strategy. Rerun the same command
    to resume after an interruption. Several processes that run it share the work.

    Example: jacobiflow calibrate --model fashion-p2 --images fashion-512 --out out/calibration

    Attributes:
        num: Number of images, chosen by the seed; all if there are fewer.
        clean: Add no training noise to the images; the paper's code adds none.
        unconditional: Do not use the images' labels.
        norm: Norm in IGM and CRM: 2 is the spectral norm.
        segments: Number of segments of a tough block that are measured one by one.
        convergence_samples: Number of samples in each convergence curve.
        per_class: Also measure each class by itself (Appendix E of the paper).
        out: Folder for report.json.
    """

    model: options.Model
    images: options.Images
    num: Annotated[int, options.DATA, options.within(2)] = 512
    clean: Annotated[options.Flag, options.DATA] = False
    unconditional: Annotated[options.Flag, options.DATA] = False
    norm: Annotated[Literal[2, "fro", 1], options.MEASUREMENT] = 2
    segments: Annotated[int, options.MEASUREMENT, options.within(1)] = 8
    convergence_samples: Annotated[int, options.MEASUREMENT, options.within(1)] = 32
    per_class: Annotated[options.Flag, options.MEASUREMENT] = False
    guidance: options.Guidance = "0"
    batch_size: options.NetworkBatchSize = 64
    seed: options.Seed = 0
    device: options.Device = "auto"
    dtype: options.Dtype = "float32"
    out: Annotated[Path, options.OUTPUT]
    folder_kind = "calibration"


@dataclass(frozen=True)
class CalibrateResult(Provenance):
    """A report.

    Attributes:
        use: The command that samples with the report.
    """

    report: jf.CalibrationReport
    use: str


def run(config: CalibrateConfig) -> CalibrateResult | None:
    """Measures the flow, and writes the report."""
    import torch

    from jacobiflow.calibration.measure import CalibrationJob
    from jacobiflow.data import Noise, load_images, noisy_images

    flow = loading.load_model(config.model, config.device, config.dtype, config.guidance)
    channels, size, _ = flow.require_images()
    data = load_images(config.images, size, channels)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(config.seed), device="cpu")
    indices = order[: config.num].sort().values
    images, labels = data.batch(indices)
    if not config.clean:
        images = noisy_images(data, indices, Noise(flow.config.noise_std), config.seed)
    if config.unconditional or not flow.config.num_classes:
        labels = None
    job = CalibrationJob(
        flow, images, labels, config.norm, segments=config.segments,
        num_convergence_samples=config.convergence_samples, per_class=config.per_class, batch_size=config.batch_size,
        seed=config.seed,
    )  # fmt: skip
    completed = run_job(job, config.out)
    if completed is None:
        return None
    use = ["jacobiflow", "sample", "--model", config.model, "--strategy", "jacobi", "--report"]
    use += [str(config.out / job.result_name), "--guidance", str(flow.guidance or 0)]
    use += ["--labels", "none"] * (labels is None)
    report = jf.CalibrationReport.from_json(completed.result)
    return CalibrateResult(report, shlex.join(use), machine=dict(job.machine))


def show(config: CalibrateConfig, result: CalibrateResult) -> None:
    """Prints tables of the metrics and sweeps of the blocks, the paper's strategies, and how to use the report."""
    from jacobiflow.calibration import gs_jacobi_notation
    from jacobiflow.calibration.convergence import TOLERANCES
    from jacobiflow.calibration.report import GUESSES

    report, settings = result.report, result.report.settings
    print(
        f"{settings.num_images} images{' (guided)' * (settings.guidance is not None)}\nsweeps: until within "
        f"{_TOLERANCE:g} of the solution, mean of {settings.num_convergence_samples} fresh latents"
    )
    print("\nWhere to start: IGM, and sweeps from there")
    rows: list[tuple[Any, ...]] = []
    for i, igm in enumerate(report.igm):
        sweeps = (f"{report.mean_sweeps('noise', _TOLERANCE, guess)[i]:.1f}" for guess in GUESSES)
        rows.append((i, *igm.values(), *sweeps, report.best_guess(i)))
    show_table(("block", *_IGM, *_SWEEPS, "guess"), rows, text=(5,))

    print("\nWhich blocks are tough: CRM and its parts")
    rows = []
    for i, num_sweeps in enumerate(report.mean_sweeps("noise", _TOLERANCE)):
        crm: tuple[Any, ...] = (None,) * 6
        if report.components is not None:
            is_tough = "yes" * (i in report.tough_blocks)
            crm = (*astuple(report.components[i]), report.crm[i], report.crm_percent[i], is_tough)
        rows.append((i, *crm, f"{num_sweeps:.1f}", fmean(report.gamma[i])))
    show_table(_CRM, rows, text=())

    if report.class_metrics:
        print(f"\nOver {len(report.class_metrics)} classes: mean ± standard deviation, and how often a guess wins")
        rows = []
        for i, spread in enumerate(report.class_spread()):
            wins = "/".join(map(str, spread.num_best.values()))
            rows.append((i, spread.crm_rank, spread.crm_percent, *spread.igm.values(), wins))
        show_table(("block", "CRM rank", "percent", *_IGM, "wins"), rows, text=())

    if report.components is None:
        print("CRM is not defined: no `output_weights`, or the scale and shift do not end in a linear layer")
    else:
        print("\nThe paper's strategies: fixed numbers of sweeps, not certified")
        for tolerance in TOLERANCES:
            print(f"to {tolerance:g}: {gs_jacobi_notation(report, tolerance)}")
    print(f"use it: {result.use}")


def describe_kept(config: CalibrateConfig) -> str:
    """Describes what an interrupted run leaves, and how to go on."""
    return f"finished units are kept in {config.out}; run the same command to resume"
