"""`jacobiflow sample`: draw samples into a folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Exit, Option

import jacobiflow as jf
from jacobiflow.cli import loading, options
from jacobiflow.cli.output import progress_bar
from jacobiflow.errors import InputValueError

if TYPE_CHECKING:
    from PIL.Image import Image

    from jacobiflow.blocks.context import Context
    from jacobiflow.evaluation.differences import PairedError
    from jacobiflow.models.flow import Flow
    from jacobiflow.utils.progress import Progress

_SHEET = "samples.png"
_SHEET_IMAGES = 100
_OURS = "ours"
_BATCH_SIZE = "Images solved together, or auto: as many as fit in memory. Default: all, at most 64."
_DENOISE = "Rate of one denoising step; 0 is off. Default: as recommended by the model."
_CERTIFY = "Measure each sample's residual, and solve it again if it is above the tolerance."
_CERTIFY_ALWAYS = "Measure blocks that were solved token by token, too."
_SENSITIVITY = "Measure how much rounding changes each sample, by a second solve."
_STRATEGIES = (
    "auto (planned for this model, machine and batch size), sequential, sequential:int16, jacobi, jacobi-J, "
    "gs-jacobi:G, gs-jacobi:G-J, window:N, the paper's [Stack-GS-J-Else], or a .json file."
)


def sample(
    model: options.Model = "fashion-p2",
    num: Annotated[int, Option(min=1, max=100_000_000, help="Number of samples.")] = 16,
    labels: options.Labels = "balanced",
    prompts: options.Prompts = None,
    encode_text: options.EncodeText = None,
    seed: options.Seed = 0,
    batch_size: Annotated[str | None, Option(help=_BATCH_SIZE)] = None,
    shard_size: Annotated[int | None, Option(min=1, help="Samples in a file. Default: about 1,024.")] = None,
    files: Annotated[Literal["npz", "png"], Option(help="png: also a file per image, by class.")] = "npz",
    strategy: Annotated[str, Option(help=_STRATEGIES)] = "auto",
    tolerance: options.Tolerance = None,
    report: options.ReportFile = None,
    guidance: options.RecommendedGuidance = None,
    denoise: Annotated[float | None, Option(help=_DENOISE)] = None,
    plain: Annotated[bool, Option("--plain", help="No guidance and no denoising.")] = False,
    certify: Annotated[bool, Option(help=_CERTIFY)] = True,
    certify_always: Annotated[bool, Option("--certify-always", help=_CERTIFY_ALWAYS)] = False,
    sensitivity: Annotated[bool, Option("--sensitivity", help=_SENSITIVITY)] = False,
    compare: Annotated[bool, Option("--compare", help="Compare with the original sampler on the first batch.")] = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the samples in the folder.")] = False,
    out: Annotated[Path, Option(help="Folder for the samples and samples.png.")] = Path("out/samples"),
) -> dict[str, Any] | None:
    """Draw samples into a folder, exact or certified.

    Guidance and denoising are as the model recommends; --guidance and --denoise replace one each, --plain both.

    The same command again resumes a run that was stopped. Several processes share the work, and write the same bytes:
    torchrun --nproc-per-node 2 -m -- jacobiflow sample ...

    Example: jacobiflow sample --model fashion-p2 --num 20 --compare --out out/demo
    """
    from jacobiflow import plots
    from jacobiflow.distributed import ProcessFailed
    from jacobiflow.utils import timing

    if report is not None and strategy.endswith(".json"):
        raise InputValueError(f"--report {report}: {strategy} has its own guesses; leave one of them out")
    if certify_always and not certify:
        raise InputValueError("--certify-always: excludes --no-certify; leave one of them out")
    size = options.parse_batch_size(batch_size)
    try:
        with jf.processes() as processes, progress_bar() as progress:
            flow = loading.load_model(model, processes.device(loading.pick_device(device)), dtype)
            if compare:
                flow.require_images()
            classes = options.parse_labels(labels, num, flow, seed)
            texts = options.parse_prompts(prompts, encode_text, num, flow)
            context = flow.check_context(classes if texts is None else texts, num)
            settings, origin = loading.resolve_settings(flow, guidance, denoise, plain, context.values is not None)
            flow = flow.guided(settings.guidance)
            if batch_size == "auto":
                size = processes.run_on_rank_zero(partial(_auto_batch_size, flow, num, None if overwrite else out))
            started = perf_counter()
            folder = jf.sample_to_folder(
                flow, num, out, seed=seed, context=context, settings=settings, strategy=strategy,
                tolerance=tolerance, certify="always" if certify_always else certify, sensitivity=sensitivity,
                batch_size=size, shard_size=shard_size, files=files, model=model,
                report=loading.load_report(report, flow), overwrite=overwrite, processes=processes,
                progress=None if processes.rank else progress,
            )  # fmt: skip
            seconds = perf_counter() - started
    except ProcessFailed:
        raise Exit(2) from None  # The first process prints the error.
    if processes.rank:
        return None
    comparison = None
    if compare:
        with progress_bar() as progress:
            comparison = _compare(flow, folder, context, texts, progress)
        plots.save_png(comparison.sheet, out / _SHEET)
    elif flow.image_shape is not None:
        _save_sheet(folder, out / _SHEET)
    machine = timing.describe_machine(flow.var.device)
    print(f"{model}: {num:,} sample{'s' * (num > 1)}, {origin}")
    _print_speed(folder, machine["device"], comparison)
    _print_files(folder, seconds, processes.count)
    return {
        "model": model, "num": num, "batch_size": folder.manifest.batch_size, "seed": seed, "strategy": strategy,
        "settings": loading.settings_text(settings), "shards": folder.manifest.num_shards,
        "processes": processes.count, "wall_seconds": seconds, "num_new": folder.num_new,
        "outcome": asdict(folder.outcome()), **_runs_to_json(folder, comparison), **machine,
    }  # fmt: skip


def _auto_batch_size(flow: Flow, num: int, earlier: Path | None) -> int:
    """Returns the batch size of the samples in the folder `earlier`, if any, else the largest that fits in memory."""
    from jacobiflow.models.memory import find_batch_size
    from jacobiflow.utils.files import MANIFEST

    if earlier is not None and (earlier / MANIFEST).exists():
        return jf.SampleFolder.open(earlier).manifest.batch_size
    return find_batch_size(flow, min(num, options.MAX_BATCH_SIZE))


@dataclass(frozen=True)
class _Comparison:
    """The original sampler against the strategy, on the first batch."""

    original: str
    original_seconds: float
    seconds: float
    speed_up: float
    error: PairedError
    sensitivity: float | None
    sheet: Image


def _compare(
    flow: Flow, folder: jf.SampleFolder, context: Context, prompts: list[str] | None, progress: Progress
) -> _Comparison:
    """Draws the first batch again, by the original sampler and by the strategy of the folder."""
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
    return _Comparison(
        original=result.original,
        original_seconds=original.seconds.median,
        seconds=ours.seconds.median,
        speed_up=result.speed_up(ours, result.original),
        error=evaluation.paired_error(images[1], images[0]),
        sensitivity=run(sample.Outputs(sensitivity=True)).outcome.sensitivity,
        sheet=sheet,
    )


def _save_sheet(folder: jf.SampleFolder, path: Path) -> None:
    """Saves the first samples as one picture."""
    import torch

    from jacobiflow import data, plots

    num = min(folder.manifest.num, _SHEET_IMAGES)
    images = torch.cat([folder.images(i) for i in range(-(-num // folder.manifest.shard_size))])[:num]
    plots.save_png(data.image_grid(data.scale(images), min(10, num)), path)


def _print_speed(folder: jf.SampleFolder, device: str, comparison: _Comparison | None) -> None:
    """Prints the speed and the exactness of the samples, also against the original sampler if it was timed."""
    manifest, cost, outcome = folder.manifest, folder.cost(), folder.outcome()
    rate = manifest.num / (cost.seconds + cost.denoise_seconds)
    denoising = f", and {cost.denoise_seconds:.3g} s of denoising" * (manifest.denoise > 0)
    print(
        f"{cost.seconds:.3g} s by {manifest.strategy} on {device}, batch size {manifest.batch_size}{denoising}: "
        f"{rate:.3g} samples a second"
    )
    exactness = [] if outcome.has_shortfall else [str(outcome)]  # A warning has told of a shortfall.
    if comparison is not None:
        without, before = (", without denoising", " before denoising") if manifest.denoise else ("", "")
        print(
            f"{comparison.speed_up:.1f}x faster than the original sampler, {comparison.original}: "
            f"{comparison.seconds:.3g} s against {comparison.original_seconds:.3g} s for the first batch{without}"
        )
        exactness.append(f"largest difference from the original sampler {comparison.error.max:.1e}")
        exactness.append(f"rounding changes these samples by up to {comparison.sensitivity:.1e}{before}")
    if exactness:
        print("; ".join(exactness))


def _print_files(folder: jf.SampleFolder, seconds: float, num_processes: int) -> None:
    """Prints the files that were written, and the rate at which several shards were drawn."""
    num_shards, num_new = folder.manifest.num_shards, folder.num_new
    if not num_new:
        print(
            f"all {folder.manifest.num:,} were in {folder.path} already, and match their checksums; --overwrite draws "
            "them again"
        )
        return
    if num_shards > 1:
        print(f"drew {num_new:,} in {seconds:,.0f} s: {num_new / seconds:.1f} a second, processes: {num_processes}")
    sheet = f", {_SHEET}" * (len(folder.manifest.shape) == 3)
    print(f"wrote {folder.path}: {num_shards} shard{'s' * (num_shards > 1)}, manifest.json, strategy.json{sheet}")


def _runs_to_json(folder: jf.SampleFolder, comparison: _Comparison | None) -> dict[str, Any]:
    """Returns the costs of the samplers for `--json`, and how they compare."""
    cost, residual = folder.cost(), folder.residual()
    run = asdict(cost) | {
        "samples_per_second": folder.manifest.num / (cost.seconds + cost.denoise_seconds),
        "residual": None if residual is None else float(residual.max()),
    }
    runs: dict[str, Any] = {folder.manifest.strategy: run}
    if comparison is None:
        return {"runs": runs}
    return {
        "runs": {comparison.original: {"seconds": comparison.original_seconds}, **runs},
        "speed_up": comparison.speed_up,
        "error": asdict(comparison.error),
        "sensitivity": comparison.sensitivity,
    }
