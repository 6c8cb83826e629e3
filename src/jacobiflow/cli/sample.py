"""`jacobiflow sample`: draw samples into a folder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Literal

import jacobiflow as jf
from jacobiflow.cli import loading, options
from jacobiflow.cli.output import format_count, format_duration, format_rate, progress_bar
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
_SHORT = 1.0  # seconds of the original sampler below which one run is no measure


@dataclass(frozen=True, kw_only=True)
class SampleConfig(options.Config):
    """Options of `jacobiflow sample`.

    Attributes:
        num: Number of samples.
        batch_size: Images solved together, or auto: as many as fit in memory. Default: the batch size of the samples
            already in --out, else --num, at most 64.
        shard_size: Samples in a file. A run that was stopped keeps whole files. Default: about 1,024.
        files: png: also a file for each image, in folders by class.
        strategy: auto (recommended) measures which is fastest on this machine. sequential: token by token. jacobi:
            sweeps of all tokens; window:N: of N tokens; gs-jacobi:G: of G segments. jacobi-J, gs-jacobi:G-J and the
            paper's [Stack-GS-J-Else] make J sweeps, without a check. Or a .json file of plan.
        denoise: Rate of one denoising step; 0 is off. Default: as recommended by the model.
        plain: No guidance and no denoising.
        certify: Measure each sample's residual, and solve it again if it is above the tolerance.
        certify_always: Check every block, even those solved token by token.
        sensitivity: Measure how much rounding changes each sample, by drawing it a second time.
        compare: Also draw the first batch by the original sampler, and compare.
        offload: Keep one block at a time on the device, for a model that is larger than it.
        overwrite: Replace the samples in the folder.
        out: Folder for the samples and samples.png.
    """

    model: options.Model = "fashion-p2"
    num: Annotated[int, options.MODEL, options.within(1, 100_000_000)] = 16
    labels: options.Labels = "balanced"
    prompts: options.Prompts = None
    encode_text: options.EncodeText = None
    seed: options.Seed = 0
    batch_size: Annotated[str | None, options.SPEED] = None
    shard_size: Annotated[int | None, options.OUTPUT, options.within(1)] = None
    files: Annotated[Literal["npz", "png"], options.OUTPUT] = "npz"
    strategy: Annotated[str, options.SPEED, options.STRATEGY] = "auto"
    tolerance: options.Tolerance = None
    report: options.ReportFile = None
    guidance: options.RecommendedGuidance = None
    denoise: Annotated[float | None, options.GUIDANCE] = None
    plain: Annotated[options.Flag, options.GUIDANCE] = False
    certify: Annotated[options.Flag, options.SPEED, options.NEGATABLE] = True
    certify_always: Annotated[options.Flag, options.SPEED] = False
    sensitivity: Annotated[options.Flag, options.SPEED] = False
    compare: Annotated[options.Flag, options.SPEED] = False
    device: options.Device = "auto"
    offload: Annotated[options.Flag, options.SPEED] = False
    dtype: options.Dtype = "float32"
    overwrite: Annotated[options.Flag, options.OUTPUT] = False
    out: Annotated[Path, options.OUTPUT] = Path("out/samples")


@dataclass(frozen=True)
class Comparison:
    """The original sampler against the strategy, on the first batch; the seconds include denoising."""

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
        seconds: The time in which it drew them, denoising included.
        preparation_seconds: The time before, for a plan and the check of samples that are there.
        samples_per_second: num_new over seconds; None if all samples were there.
        cost: The cost of all samples; None if other parts are missing, like `outcome`.
        residual: The largest residual of all samples; None if it was not measured.
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
    num_new: int
    seconds: float
    preparation_seconds: float
    samples_per_second: float | None
    cost: Cost | None
    residual: float | None
    outcome: Outcome | None
    comparison: Comparison | None
    has_sheet: bool


def run(config: SampleConfig, processes: Processes) -> SampleResult | None:
    """Draw samples into a folder, exact or certified.

    Guidance and denoising are as the model recommends. --guidance and --denoise each replace one of them; --plain
    turns both off.

    The same command again resumes a run that was stopped. Several processes share the work, and write the same bytes:
    torchrun --nproc-per-node 2 -m -- jacobiflow sample ..., or srun.

    Example: jacobiflow sample --model fashion-p2 --num 20 --compare --out out/demo
    """
    from jacobiflow.utils.timing import describe_machine

    _check_options(config)
    size = options.parse_batch_size(config.batch_size)
    device = processes.device(loading.pick_device(config.device))
    flow = loading.load_model(config.model, device, config.dtype, offload=config.offload)
    classes = options.parse_labels(config.labels, config.num, flow, config.seed)
    texts = options.parse_prompts(config.prompts, config.encode_text, config.num, flow)
    context = flow.check_context(classes if texts is None else texts, config.num)
    settings, origin = loading.resolve_settings(
        flow, config.guidance, config.denoise, config.plain, context.values is not None
    )
    flow = flow.guided(settings.guidance)
    batch_size, shard_size = processes.run_on_rank_zero(partial(_sizes, config, size, flow))
    started = perf_counter()
    with progress_bar(is_shown=processes.rank == 0) as progress:
        folder = jf.sample_to_folder(
            flow, config.num, config.out, seed=config.seed, context=context, settings=settings,
            strategy=config.strategy, tolerance=config.tolerance,
            certify="always" if config.certify_always else config.certify, sensitivity=config.sensitivity,
            batch_size=batch_size, shard_size=shard_size, files=config.files, model=config.model,
            report=loading.load_report(config.report, flow), overwrite=config.overwrite, processes=processes,
            progress=progress,
        )  # fmt: skip
        if processes.rank > 0:
            return None
        preparation_seconds = perf_counter() - started - folder.seconds
        comparison = _compare(flow, folder, context, texts, progress) if config.compare else None
    has_sheet = folder.manifest.has_pictures and folder.is_complete
    if has_sheet and comparison is None:
        _save_sheet(folder, config.out / _SHEET)
    manifest, residual = folder.manifest, folder.residual() if folder.is_complete else None
    return SampleResult(
        model=config.model, num=config.num, seed=config.seed, batch_size=manifest.batch_size,
        strategy=config.strategy, settings=loading.settings_text(settings), origin=origin, denoise=manifest.denoise,
        out=str(config.out), shards=manifest.num_shards, processes=processes.count,
        num_new=folder.num_new, seconds=folder.seconds, preparation_seconds=preparation_seconds,
        samples_per_second=folder.num_new / folder.seconds if folder.num_new else None,
        cost=folder.cost() if folder.is_complete else None,
        residual=None if residual is None else float(residual.max()),
        outcome=folder.outcome() if folder.is_complete else None, comparison=comparison, has_sheet=has_sheet,
        machine=describe_machine(flow.var.device),
    )  # fmt: skip


def _check_options(config: SampleConfig) -> None:
    if config.report is not None and config.strategy.endswith(".json"):
        raise InputValueError(f"--report {config.report}: {config.strategy} has its own guesses; leave one of them out")
    if config.certify_always and not config.certify:
        raise InputValueError("--certify-always: excludes --no-certify; leave one of them out")


def _sizes(config: SampleConfig, size: int | None, flow: Flow) -> tuple[int | None, int | None]:
    """Returns the batch size and the shard size: those of the options, else of samples in the folder, if any."""
    from jacobiflow.models.memory import find_batch_size

    earlier = None if config.overwrite else _open_earlier(config.out)
    if earlier is not None and size is None:
        return earlier.manifest.batch_size, config.shard_size or earlier.manifest.shard_size
    if config.batch_size == "auto":
        size = find_batch_size(flow, min(config.num, options.MAX_BATCH_SIZE))
    return size, config.shard_size


def _open_earlier(out: Path) -> jf.SampleFolder | None:
    """Opens the samples of an earlier run, if there are any."""
    from jacobiflow.utils.files import MANIFEST, read_object

    is_there = (read_object(out / MANIFEST) or {}).get("kind") == "samples"
    return jf.SampleFolder.open(out) if is_there else None


def _compare(
    flow: Flow, folder: jf.SampleFolder, context: Context, prompts: list[str] | None, progress: Progress | None
) -> Comparison:
    """Draws the first batch again, by the original sampler and by the strategy, and saves a picture of both."""
    from jacobiflow import evaluation, plots
    from jacobiflow.comparison import compare
    from jacobiflow.fixed_point.options import SolveOptions
    from jacobiflow.models import latents
    from jacobiflow.sampling import denoise, sample
    from jacobiflow.utils import timing

    manifest, config = folder.manifest, flow.config
    num = min(manifest.num, manifest.batch_size)
    context = context[:num].to(flow.var.device)
    z = latents.draw_latents(num, config.num_tokens, config.token_channels, manifest.seed)
    solve_options = SolveOptions(certify=manifest.certify)
    run = partial(sample.sample_with_strategy, flow, folder.strategy(), z, context, solve_options)
    if progress is not None:
        progress(0, 1, "timing")  # Shows the bar: the original sampler may take minutes until the first step.
    runs = {_OURS: run}
    timed = partial(compare.compare_samplers, flow, z, context.values, runs, progress=progress)
    result = timed(repeats=1, warm_up=False)
    if result.result(result.original).seconds.median < _SHORT:
        result = timed()
    original, ours = result.result(result.original), result.result(_OURS)
    images, seconds = [original.x, ours.x], [original.seconds.median, ours.seconds.median]
    if manifest.denoise:
        for i, x in enumerate(images):
            run_denoising = partial(denoise.denoise_checked, flow, x, context, manifest.denoise, 64)
            denoise_seconds, images[i] = timing.time_call(run_denoising, x.device)
            seconds[i] += denoise_seconds
    if manifest.has_pictures:
        labels = [] if prompts is not None or context.values is None else context.values.tolist()
        classes = [flow.classes[k] if flow.classes and k >= 0 else f"class {k}" for k in labels]
        first = slice(min(num, _SHEET_IMAGES))
        names = "original sampler", manifest.strategy
        sheet = plots.comparison_sheet(images[0][first], images[1][first], names, (prompts or classes)[first])
        plots.save_png(sheet, folder.path / _SHEET)
    return Comparison(
        original=result.original,
        original_seconds=seconds[0],
        seconds=seconds[1],
        speed_up=seconds[0] / seconds[1],
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


def show(result: SampleResult) -> None:
    """Prints the samples, their speed and exactness, and the files."""
    device, is_complete = result.machine["device"], result.cost is not None
    print(f"{result.model}: {format_count(result.num, 'sample')} by {result.strategy} on {device}, batch size "
          f"{result.batch_size}")  # fmt: skip
    print(result.origin)
    if is_complete and not result.num_new:
        print(f"all {result.num:,} were there already, and match their checksums; --overwrite draws them again")
    elif result.num_new:
        print(_describe_speed(result))
    # A warning has told of a shortfall.
    if result.outcome is not None and not result.outcome.has_shortfall:
        print(result.outcome)
    if result.comparison is not None:
        _print_comparison(result, result.comparison)
    if not is_complete:
        print(f"samples of {result.out} are missing, which jacobiflow info --check {result.out} names")
        return
    sheet = f", {_SHEET}" * result.has_sheet
    print(f"wrote {result.out}: {format_count(result.shards, 'shard')}, manifest.json, strategy.json{sheet}")


def _describe_speed(result: SampleResult) -> str:
    """Describes how many samples this command has drawn, and how fast."""
    num_kept = result.num - result.num_new
    existing = f" ({num_kept:,} were there)" if num_kept and result.cost is not None else ""
    denoising = ", denoising included" * (result.denoise > 0)
    processes = f" by {result.processes} processes" * (result.processes > 1)
    preparation = result.preparation_seconds
    before = f" (planning and checks before: {format_duration(preparation)})" if preparation >= 1 else ""
    return (
        f"drew {result.num_new:,}{existing}{processes} in {_format_seconds(result.seconds)}{denoising}: "
        f"{format_rate(result.num_new, result.seconds)} a second{before}"
    )


def _print_comparison(result: SampleResult, comparison: Comparison) -> None:
    denoising = "denoising included" if result.denoise else "without denoising"
    print(
        f"first batch of {min(result.num, result.batch_size):,} again, {denoising}: original sampler "
        f"{_format_seconds(comparison.original_seconds)}, here {_format_seconds(comparison.seconds)}: "
        f"{comparison.speed_up:.{1 if comparison.speed_up < 10 else 0}f}x faster"
    )
    before = " before denoising" * (result.denoise > 0)
    print(
        f"largest difference from the original sampler {comparison.error.max:.1e}; rounding changes these samples by "
        f"up to {comparison.sensitivity:.1e}{before}"
    )


def _format_seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:,.0f} s"


def describe_kept(config: SampleConfig) -> str:
    """Describes the samples that Ctrl-C leaves, and how to go on."""
    folder = _open_earlier(config.out)
    if folder is None:
        return "no sample is drawn; run the same command to start again"
    num, num_kept = folder.manifest.num, folder.num_drawn
    hint = (
        "" if num_kept else f"; a file is kept once its {folder.manifest.shard_size:,} samples are drawn (--shard-size)"
    )
    return f"{num_kept:,} of {num:,} samples are kept in {config.out}{hint}; run the same command to resume"
