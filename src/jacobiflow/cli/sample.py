"""`jacobiflow sample`: draw samples into a folder."""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Exit, Option

import jacobiflow as jf
from jacobiflow.cli import shared
from jacobiflow.cli.shared import progress_bar
from jacobiflow.errors import InputValueError

if TYPE_CHECKING:
    from jacobiflow.blocks.context import Context
    from jacobiflow.models.flow import Flow
    from jacobiflow.utils.progress import Progress

_SHEET = "samples.png"
_SHEET_IMAGES = 100
_LONG = 10  # seconds of a run that is announced
_OURS = "ours"
_BATCH_SIZE = "Images solved together, or auto: as many as fit in memory. Default: all, at most 64."
_DENOISE = "Rate of one denoising step; 0 is off. Default: as recommended by the model."
_SENSITIVITY = "Measure how much rounding changes each sample, by a second solve."
_STRATEGIES = (
    "auto (planned for this model, machine and batch size), sequential, sequential:int16, jacobi, jacobi-J, "
    "gs-jacobi:G, gs-jacobi:G-J, window:N, the paper's [Stack-GS-J-Else], or a .json file."
)


def sample(
    model: shared.Model = "fashion-p2",
    num: Annotated[int, Option(min=1, max=100_000_000, help="How many samples.")] = 16,
    labels: shared.Labels = "balanced",
    prompts: shared.Prompts = None,
    encode_text: shared.EncodeText = None,
    seed: shared.Seed = 0,
    batch_size: Annotated[str | None, Option(help=_BATCH_SIZE)] = None,
    shard_size: Annotated[int | None, Option(min=1, help="Images in a file. Default: about 1,024.")] = None,
    files: Annotated[Literal["npz", "png"], Option(help="png: also a file per image, by class.")] = "npz",
    strategy: Annotated[str, Option(help=_STRATEGIES)] = "auto",
    tolerance: shared.Tolerance = None,
    report: shared.ReportFile = None,
    guidance: shared.Recommended = None,
    denoise: Annotated[float | None, Option(help=_DENOISE)] = None,
    plain: Annotated[bool, Option("--plain", help="No guidance and no denoising.")] = False,
    certify: Annotated[bool, Option(help="Measure each sample's residuals; solve again above the tolerance.")] = True,
    certify_always: Annotated[bool, Option("--certify-always", help="Also measure blocks solved exactly.")] = False,
    sensitivity: Annotated[bool, Option("--sensitivity", help=_SENSITIVITY)] = False,
    compare: Annotated[bool, Option("--compare", help="Compare with the original sampler on the first batch.")] = False,
    device: shared.Device = "auto",
    dtype: shared.Dtype = "float32",
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the samples in the folder.")] = False,
    out: Annotated[Path, Option(help="Folder for the samples and samples.png.")] = Path("out/samples"),
) -> dict[str, Any] | None:
    """Draw samples into a folder, exact or certified.

    Guidance and denoising are as the model recommends; --guidance and --denoise replace one each, --plain both.

    The same command again resumes a run that was stopped. Several processes share the work, and write the same bytes:
    torchrun --nproc-per-node 2 -m -- jacobiflow sample ...

    Example: jacobiflow sample --model fashion-p2 --num 20 --compare --out out/demo
    """
    import torch

    from jacobiflow import data, plots
    from jacobiflow.sampling.folder import FirstProcessFailed
    from jacobiflow.utils import timing

    if report is not None and strategy.endswith(".json"):
        raise InputValueError(f"--report {report}: {strategy} has its own guesses; leave one of them out")
    if certify_always and not certify:
        raise InputValueError("--certify-always: excludes --no-certify; leave one of them out")
    size = shared.parse_batch_size(batch_size)
    try:
        with jf.processes() as group, progress_bar() as progress:
            flow = shared.load_model(model, group.device(shared.pick_device(device)), dtype)
            if compare:
                flow.require_images()
            classes = shared.parse_labels(labels, num, flow, seed)
            texts = shared.parse_prompts(prompts, encode_text, num, flow)
            context = flow.check_context(classes if texts is None else texts, num)
            settings, origin = shared.resolve_settings(flow, guidance, denoise, plain, context.values is not None)
            flow = flow.guided(settings.guidance)
            if batch_size == "auto":
                size = group.run_on_rank_zero(partial(_auto_batch_size, flow, num, None if overwrite else out))
            started = perf_counter()
            folder = jf.sample_to_folder(
                flow, num, out, seed=seed, context=context, settings=settings, strategy=strategy,
                tolerance=tolerance, certify="always" if certify_always else certify, sensitivity=sensitivity,
                batch_size=size, shard_size=shard_size, files=files, model=model,
                report=shared.load_report(report, flow), overwrite=overwrite, processes=group,
                progress=None if group.rank else _announced(progress, out, group.count),
            )  # fmt: skip
            seconds = perf_counter() - started
    except FirstProcessFailed:
        raise Exit(2) from None  # the first process says why
    if group.rank:
        return None
    manifest, cost, outcome = folder.manifest, folder.cost(), folder.outcome()
    certificate = folder.certificate()
    run = asdict(cost) | {
        "samples_per_second": num / (cost.seconds + cost.denoise_seconds),
        "certificate": None if certificate is None else float(certificate.max()),
    }
    results = {
        "model": model, "num": num, "batch_size": manifest.batch_size, "seed": seed, "strategy": strategy,
        "settings": shared.settings_text(settings), "shards": manifest.num_shards, "processes": group.count,
        "wall_seconds": seconds, "drawn": folder.drawn, "outcome": asdict(outcome), "runs": {strategy: run},
        **timing.machine(flow.var.device),
    }  # fmt: skip
    if compare:
        with progress_bar() as progress:
            comparison = _compare(flow, folder, context, texts, out / _SHEET, progress)
        results |= comparison | {"runs": comparison["runs"] | results["runs"]}
    elif flow.image_shape is not None:
        few = min(num, _SHEET_IMAGES)
        shards = [folder.images(i) for i in range(-(-few // manifest.shard_size))]
        plots.save_png(data.image_grid(data.scale(torch.cat(shards)[:few]), min(10, num)), out / _SHEET)
    # A warning has named a shortfall already.
    _print(results, origin, None if outcome.has_shortfall else str(outcome), is_denoised=manifest.denoise > 0)
    if folder.drawn:
        rate, plural = folder.drawn / seconds, "s" * (manifest.num_shards > 1)
        if plural:
            print(f"drew {folder.drawn:,} in {seconds:,.0f} s: {rate:.1f} a second, processes: {group.count}")
        sheet = "" if flow.image_shape is None else f", {_SHEET}"
        print(f"wrote {out}: {manifest.num_shards} shard{plural}, manifest.json, strategy.json{sheet}")
    else:
        print(f"all {num:,} were in {out} already, and match their checksums; --overwrite draws them again")
    return results


def _auto_batch_size(flow: Flow, num: int, earlier: Path | None) -> int:
    """The batch size of the samples in a folder, if it has some, or else the largest that fits."""
    from jacobiflow.models.memory import find_batch_size
    from jacobiflow.utils.files import MANIFEST

    if earlier is not None and (earlier / MANIFEST).exists():
        return jf.SampleFolder.open(earlier).manifest.batch_size
    return find_batch_size(flow, min(num, shared.MOST_AT_ONCE))


def _announced(progress: Progress, out: Path, num_processes: int) -> Progress:
    """Returns `progress`, preceded by a line with the time that the plan predicts, if that is long."""
    from jacobiflow.sampling.folder.reader import STRATEGY

    has_begun = False

    def report(done: int, total: int, what: str) -> None:
        nonlocal has_begun
        if not has_begun:
            folder, has_begun = jf.SampleFolder.open(out), True
            prediction = jf.Strategy.load(out / STRATEGY).prediction
            rate = 0.0 if prediction is None else prediction.seconds / prediction.batch_size / num_processes
            if (seconds := rate * (total - done)) >= _LONG:
                note = ", without denoising" if folder.manifest.denoise else ""
                time = f"about {shared.duration(seconds)} by the plan{note}"
                print(f"{total - done:,} {what} to draw: {time}", file=sys.stderr)
        progress(done, total, what)

    return report


def _compare(
    flow: Flow, folder: jf.SampleFolder, context: Context, prompts: list[str] | None, sheet: Path,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Draws the first batch again by the original sampler and the folder's strategy.

    Returns times, the error, and the sensitivity of these samples.
    """
    from jacobiflow import plots
    from jacobiflow.comparison import compare
    from jacobiflow.fixed_point.options import SolveOptions
    from jacobiflow.models import latents
    from jacobiflow.sampling import denoise, sample
    from jacobiflow.utils import timing

    manifest, config = folder.manifest, flow.config
    num = min(manifest.num, manifest.batch_size)
    context = context[:num].to(flow.var.device)
    z = latents.draw_latents(num, config.num_tokens, config.token_channels, manifest.seed)
    options = SolveOptions(certify=manifest.certify)
    run = partial(sample.sample_with_strategy, flow, folder.strategy(), z, context, options)
    progress(0, 1, "timing")  # the original sampler may take minutes before the first real call
    result = compare.compare(flow, z, context.values, {_OURS: run}, repeats=1, warm_up=False, progress=progress)
    sensitivity = run(sample.Outputs(sensitivity=True)).outcome.sensitivity
    rows = [result.row(result.original), result.row(_OURS)]
    original, ours = (row.x for row in rows)
    if manifest.denoise:
        original, ours = (
            denoise.denoise_checked(flow, images, context, manifest.denoise, 64) for images in (original, ours)
        )
    few, names = slice(min(num, _SHEET_IMAGES)), ("original sampler", manifest.strategy)
    classes = [] if prompts is not None or context.values is None else [f"class {k}" for k in context.values.tolist()]
    captions = (prompts or classes)[few]
    plots.save_png(plots.comparison_sheet(original[few], ours[few], names, columns=captions), sheet)
    return {
        "runs": {result.original: {"seconds": rows[0].seconds.median}},
        "speed_up": result.speed_up(rows[1], result.original),
        "error": asdict(timing.paired_error(ours, original)),
        "sensitivity": sensitivity,
    }


def _print(results: dict[str, Any], origin: str, outcome: str | None, is_denoised: bool) -> None:
    """Prints what was drawn, how fast, how fast against what if that was timed, and how exact; a line for each."""
    num, strategy, runs = results["num"], results["strategy"], results["runs"]
    run = runs[strategy]
    speed = f"{run['seconds']:.3g} s by {strategy} on {results['device']}, batch size {results['batch_size']}"
    speed += f", and {run['denoise_seconds']:.3g} s of denoising" * is_denoised
    speed += f": {run['samples_per_second']:.3g} samples a second"
    exactness = [] if outcome is None else [outcome]
    if "error" in results:
        original, of_original = next(iter(runs.items()))
        ours = of_original["seconds"] / results["speed_up"]
        speed += f"\n{results['speed_up']:.1f}x faster than the original sampler, {original}: "
        speed += f"{ours:.3g} s against {of_original['seconds']:.3g} s for the first batch"
        speed += ", without denoising" * is_denoised
        exactness.append(f"largest difference from the original sampler {results['error']['max']:.1e}")
        rounding = f"rounding changes these samples by up to {results['sensitivity']:.1e}"
        exactness.append(rounding + " before denoising" * is_denoised)
    print(f"{results['model']}: {num:,} sample{'s' * (num > 1)}, {origin}\n{speed}")
    if exactness:
        print("; ".join(exactness))
