"""`jacobiflow sample`: draw samples into a folder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Option

import jacobiflow as jf
from jacobiflow.cli import loading, options
from jacobiflow.cli.job import as_command
from jacobiflow.cli.output import progress_bar
from jacobiflow.errors import InputValueError
from jacobiflow.utils.provenance import Provenance

if TYPE_CHECKING:
    from jacobiflow.blocks.context import Context
    from jacobiflow.distributed import Processes
    from jacobiflow.evaluation.differences import PairedError
    from jacobiflow.models.flow import Flow
    from jacobiflow.sampling.folder import Cost
    from jacobiflow.sampling.result import Outcome
    from jacobiflow.utils.progress import Progress

_SHEET = "samples.png"
_SHEET_IMAGES = 100
_OURS = "ours"
_BATCH_SIZE = "Images solved together, or auto: as many as fit in memory. Default: all, at most 64."
_DENOISE = "Rate of one denoising step; 0 is off. Default: as recommended by the model."
_CERTIFY = "Measure each sample's residual, and solve it again if it is above the tolerance."
_CERTIFY_ALWAYS = "Measure blocks that were solved token by token, too."
_SENSITIVITY = "Measure how much rounding changes each sample, by a second solve."
_OFFLOAD = "Keep one block at a time on the device, for a model that is larger than it."
_STRATEGIES = (
    "auto (planned for this model, machine and batch size), sequential, sequential:int16, jacobi, jacobi-J, "
    "gs-jacobi:G, gs-jacobi:G-J, window:N, the paper's [Stack-GS-J-Else], or a .json file."
)


@dataclass(frozen=True)
class SampleConfig:
    """Options of `jacobiflow sample`."""

    model: options.Model = "fashion-p2"
    num: Annotated[int, Option(min=1, max=100_000_000, help="Number of samples.")] = 16
    labels: options.Labels = "balanced"
    prompts: options.Prompts = None
    encode_text: options.EncodeText = None
    seed: options.Seed = 0
    batch_size: Annotated[str | None, Option(help=_BATCH_SIZE)] = None
    shard_size: Annotated[int | None, Option(min=1, help="Samples in a file. Default: about 1,024.")] = None
    files: Annotated[Literal["npz", "png"], Option(help="png: also a file per image, by class.")] = "npz"
    strategy: Annotated[str, Option(help=_STRATEGIES)] = "auto"
    tolerance: options.Tolerance = None
    report: options.ReportFile = None
    guidance: options.RecommendedGuidance = None
    denoise: Annotated[float | None, Option(help=_DENOISE)] = None
    plain: Annotated[bool, Option("--plain", help="No guidance and no denoising.")] = False
    certify: Annotated[bool, Option(help=_CERTIFY)] = True
    certify_always: Annotated[bool, Option("--certify-always", help=_CERTIFY_ALWAYS)] = False
    sensitivity: Annotated[bool, Option("--sensitivity", help=_SENSITIVITY)] = False
    compare: Annotated[bool, Option("--compare", help="Compare with the original sampler on the first batch.")] = False
    device: options.Device = "auto"
    offload: Annotated[bool, Option("--offload", help=_OFFLOAD)] = False
    dtype: options.Dtype = "float32"
    part: options.Part = None
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the samples in the folder.")] = False
    out: Annotated[Path, Option(help="Folder for the samples and samples.png.")] = Path("out/samples")


@dataclass(frozen=True)
class Speed:
    """The cost of the samples, and how many were drawn in a second of computing."""

    cost: Cost
    samples_per_second: float
    residual: float | None


@dataclass(frozen=True)
class Comparison:
    """The original sampler against the strategy, on the first batch."""

    original: str
    original_seconds: float
    seconds: float
    speed_up: float
    error: PairedError
    sensitivity: float | None


@dataclass(frozen=True)
class SampleResult(Provenance):
    """The samples that a command has drawn.

    Attributes:
        settings: Guidance and denoising as options, and a note if the model recommends them.
        num_new: Number of samples that this command drew.
        speed: The speed of all samples; None if other parts are missing, like `outcome`.
    """

    model: str
    num: int
    seed: int
    batch_size: int
    strategy: str
    settings: str
    origin: str
    denoise: float
    out: str
    shards: int
    processes: int
    part: str
    num_new: int
    wall_seconds: float
    speed: Speed | None
    outcome: Outcome | None
    comparison: Comparison | None
    has_sheet: bool


def run(config: SampleConfig, processes: Processes) -> SampleResult | None:
    """Draw samples into a folder, exact or certified.

    Guidance and denoising are as the model recommends; --guidance and --denoise replace one each, --plain both.

    The same command again resumes a run that was stopped. Several processes share the work, and write the same bytes:
    torchrun --nproc-per-node 2 -m -- jacobiflow sample ..., or srun. Jobs of their own share it by --part 1/8, 2/8, ...

    Example: jacobiflow sample --model fashion-p2 --num 20 --compare --out out/demo
    """
    from jacobiflow.utils.timing import describe_machine

    _check_options(config)
    size = options.parse_batch_size(config.batch_size)
    part = jf.Part.parse(config.part)
    device = processes.device(loading.pick_device(config.device))
    flow = loading.load_model(config.model, device, config.dtype, offload=config.offload)
    if config.compare:
        flow.require_images()
    classes = options.parse_labels(config.labels, config.num, flow, config.seed)
    texts = options.parse_prompts(config.prompts, config.encode_text, config.num, flow)
    context = flow.check_context(classes if texts is None else texts, config.num)
    settings, origin = loading.resolve_settings(
        flow, config.guidance, config.denoise, config.plain, context.values is not None
    )
    flow = flow.guided(settings.guidance)
    if config.batch_size == "auto":
        earlier = None if config.overwrite else config.out
        size = processes.run_on_rank_zero(partial(_auto_batch_size, flow, config.num, earlier))
    started = perf_counter()
    with progress_bar(is_shown=processes.rank == 0) as progress:
        folder = jf.sample_to_folder(
            flow, config.num, config.out, seed=config.seed, context=context, settings=settings,
            strategy=config.strategy, tolerance=config.tolerance,
            certify="always" if config.certify_always else config.certify, sensitivity=config.sensitivity,
            batch_size=size, shard_size=config.shard_size, files=config.files, model=config.model,
            report=loading.load_report(config.report, flow), overwrite=config.overwrite, processes=processes,
            progress=progress, part=part,
        )  # fmt: skip
        seconds = perf_counter() - started
        if processes.rank > 0:
            return None
        comparison = _compare(flow, folder, context, texts, progress) if config.compare else None
    has_sheet = flow.image_shape is not None and folder.is_complete
    if has_sheet and comparison is None:
        _save_sheet(folder, config.out / _SHEET)
    manifest = folder.manifest
    return SampleResult(
        model=config.model, num=config.num, seed=config.seed, batch_size=manifest.batch_size,
        strategy=config.strategy, settings=loading.settings_text(settings), origin=origin, denoise=manifest.denoise,
        out=str(config.out), shards=manifest.num_shards, processes=processes.count, part=str(part),
        num_new=folder.num_new, wall_seconds=seconds, speed=_speed(folder) if folder.is_complete else None,
        outcome=folder.outcome() if folder.is_complete else None, comparison=comparison, has_sheet=has_sheet,
        machine=describe_machine(flow.var.device),
    )  # fmt: skip


def _check_options(config: SampleConfig) -> None:
    if config.report is not None and config.strategy.endswith(".json"):
        raise InputValueError(f"--report {config.report}: {config.strategy} has its own guesses; leave one of them out")
    if config.certify_always and not config.certify:
        raise InputValueError("--certify-always: excludes --no-certify; leave one of them out")
    if config.compare and config.part is not None:
        raise InputValueError("--compare: excludes --part; compare in a run of its own")


def _auto_batch_size(flow: Flow, num: int, earlier: Path | None) -> int:
    """Returns the batch size of the samples in the folder `earlier`, if any, else the largest that fits in memory."""
    from jacobiflow.models.memory import find_batch_size
    from jacobiflow.utils.files import MANIFEST

    if earlier is not None and (earlier / MANIFEST).exists():
        return jf.SampleFolder.open(earlier).manifest.batch_size
    return find_batch_size(flow, min(num, options.MAX_BATCH_SIZE))


def _compare(
    flow: Flow, folder: jf.SampleFolder, context: Context, prompts: list[str] | None, progress: Progress | None
) -> Comparison:
    """Draws the first batch again, by the original sampler and by the strategy, and saves a picture of both."""
    from jacobiflow import evaluation, plots
    from jacobiflow.comparison import compare
    from jacobiflow.fixed_point.options import SolveOptions
    from jacobiflow.models import latents
    from jacobiflow.sampling import denoise, sample

    manifest, config = folder.manifest, flow.config
    num = min(manifest.num, manifest.batch_size)
    context = context[:num].to(flow.var.device)
    z = latents.draw_latents(num, config.num_tokens, config.token_channels, manifest.seed)
    solve_options = SolveOptions(certify=manifest.certify)
    run = partial(sample.sample_with_strategy, flow, folder.strategy(), z, context, solve_options)
    if progress is not None:
        progress(0, 1, "timing")  # Shows the bar: the original sampler may take minutes until the first step.
    runs = {_OURS: run}
    result = compare.compare_samplers(flow, z, context.values, runs, repeats=1, warm_up=False, progress=progress)
    original, ours = result.result(result.original), result.result(_OURS)
    images = [original.x, ours.x]
    if manifest.denoise:
        images = [denoise.denoise_checked(flow, x, context, manifest.denoise, 64) for x in images]
    classes = [] if prompts is not None or context.values is None else [f"class {k}" for k in context.values.tolist()]
    sheet = plots.comparison_sheet(
        images[0][:_SHEET_IMAGES],
        images[1][:_SHEET_IMAGES],
        ("original sampler", manifest.strategy),
        (prompts or classes)[: min(num, _SHEET_IMAGES)],
    )
    plots.save_png(sheet, folder.path / _SHEET)
    return Comparison(
        original=result.original,
        original_seconds=original.seconds.median,
        seconds=ours.seconds.median,
        speed_up=result.speed_up(ours, result.original),
        error=evaluation.paired_error(images[1], images[0]),
        sensitivity=run(sample.Outputs(sensitivity=True)).outcome.sensitivity,
    )


def _save_sheet(folder: jf.SampleFolder, path: Path) -> None:
    """Saves the first samples as one picture."""
    import torch

    from jacobiflow import data, plots

    num = min(folder.manifest.num, _SHEET_IMAGES)
    images = torch.cat([folder.images(i) for i in range(-(-num // folder.manifest.shard_size))])[:num]
    plots.save_png(data.image_grid(data.scale(images), min(10, num)), path)


def _speed(folder: jf.SampleFolder) -> Speed:
    cost, residual = folder.cost(), folder.residual()
    rate = folder.manifest.num / (cost.seconds + cost.denoise_seconds)
    return Speed(cost, rate, None if residual is None else float(residual.max()))


def show(result: SampleResult) -> None:
    """Prints the samples, their speed and exactness, and the files."""
    print(f"{result.model}: {result.num:,} sample{'s' * (result.num > 1)}, {result.origin}")
    if result.speed is not None:
        _print_speed(result, result.speed)
    if not result.num_new and result.speed is not None:
        print(
            f"all {result.num:,} were in {result.out} already, and match their checksums; --overwrite draws them again"
        )
        return
    if result.shards > 1:
        rate = f"{result.num_new / result.wall_seconds:.1f} a second"
        print(f"drew {result.num_new:,} in {result.wall_seconds:,.0f} s: {rate}, processes: {result.processes}")
    if result.speed is None:
        print(
            f"part {result.part} has drawn its samples into {result.out}; others are missing, which jacobiflow info "
            f"--check {result.out} names"
        )
        return
    sheet = f", {_SHEET}" * result.has_sheet
    print(f"wrote {result.out}: {result.shards} shard{'s' * (result.shards > 1)}, manifest.json, strategy.json{sheet}")


def _print_speed(result: SampleResult, speed: Speed) -> None:
    """Prints the speed and the exactness of the samples, also against the original sampler if it was timed."""
    cost, comparison, outcome = speed.cost, result.comparison, result.outcome
    denoising = f", and {cost.denoise_seconds:.3g} s of denoising" * (result.denoise > 0)
    print(
        f"{cost.seconds:.3g} s by {result.strategy} on {result.machine['device']}, batch size {result.batch_size}"
        f"{denoising}: {speed.samples_per_second:.3g} samples a second"
    )
    # A warning has told of a shortfall.
    exactness = [] if outcome is None or outcome.has_shortfall else [str(outcome)]
    if comparison is not None:
        without, before = (", without denoising", " before denoising") if result.denoise else ("", "")
        print(
            f"{comparison.speed_up:.1f}x faster than the original sampler, {comparison.original}: "
            f"{comparison.seconds:.3g} s against {comparison.original_seconds:.3g} s for the first batch{without}"
        )
        exactness.append(f"largest difference from the original sampler {comparison.error.max:.1e}")
        exactness.append(f"rounding changes these samples by up to {comparison.sensitivity:.1e}{before}")
    if exactness:
        print("; ".join(exactness))


sample = as_command(SampleConfig, run, show)
