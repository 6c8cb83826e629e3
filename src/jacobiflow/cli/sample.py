"""`jacobiflow sample`: draw images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Exit, Option

from jacobiflow.cli import options
from jacobiflow.cli.screen import progress_bar, show_table

if TYPE_CHECKING:
    from jacobiflow.flows.image_flow import ImageFlow
    from jacobiflow.progress import Progress
    from jacobiflow.storage import SampleFolder

_SHEET = "samples.png"
_SHEET_IMAGES = 100
_OURS = "ours"
_STRATEGIES = (
    "auto (planned for this model, machine and batch size), sequential, jacobi, jacobi-J, gs-jacobi:G, gs-jacobi:G-J, "
    "window:N, the paper's [Stack-GS-J-Else], or a .json file."
)


def sample(
    model: options.Model = "fashion-p2",
    num: Annotated[int, Option(min=1, max=100_000_000, help="How many images.")] = 16,
    labels: options.Labels = "balanced",
    seed: options.Seed = 0,
    batch_size: Annotated[
        str | None,
        Option(help="Images solved together, or auto: as many as fit in memory. Default: all, at most 64."),
    ] = None,
    shard_size: Annotated[
        int | None, Option(min=1, help="Images in a file, which a stopped run loses. Default: about 1,024.")
    ] = None,
    files: Annotated[
        Literal["npz", "png"], Option(help="npz: a file per shard. png: also one per image, by class.")
    ] = "npz",
    strategy: Annotated[str, Option(help=_STRATEGIES)] = "auto",
    tolerance: options.Tolerance = None,
    report: options.ReportFile = None,
    guidance: Annotated[
        str | None, Option(help=f"{options.GUIDANCE} Default: as the model recommends.", show_default=False)
    ] = None,
    denoise: Annotated[
        float | None,
        Option(help="Rate of one denoising step; 0 is off. Default: as the model recommends.", show_default=False),
    ] = None,
    plain: Annotated[
        bool, Option("--plain", help="Without the guidance and the denoising that the model recommends.")
    ] = False,
    certify: Annotated[
        bool, Option(help="Measure every sample's residual in every block, and solve again above the tolerance.")
    ] = True,
    certify_always: Annotated[
        bool, Option("--certify-always", help="Also measure blocks that are exact by construction.")
    ] = False,
    compare: Annotated[
        bool, Option("--compare", help="Also draw the first batch by the original sampler, and compare.")
    ] = False,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    overwrite: Annotated[
        bool, Option("--overwrite", help="Draw all samples again, in place of those in the folder.")
    ] = False,
    out: Annotated[Path, Option(help="Folder for shards/, manifest.json, strategy.json, samples.png.")] = Path(
        "out/samples"
    ),
) -> dict[str, Any] | None:
    """Draw images into a folder, each certified.

    Guidance and denoising are as the model recommends; --guidance and --denoise replace one each, --plain both.

    The same command again resumes a run that was stopped. Several processes share the work, and write the same bytes:
    torchrun --nproc-per-node 2 -m -- jacobiflow sample ...

    Example: jacobiflow sample --model fashion-p2 --num 20 --compare --out out/demo
    """
    from dataclasses import asdict
    from time import perf_counter

    import torch

    from jacobiflow.data import scale
    from jacobiflow.errors import InputValueError
    from jacobiflow.measuring import machine
    from jacobiflow.memory import fitting_batch
    from jacobiflow.plots import image_grid, save_png
    from jacobiflow.storage import FirstProcessFailed, processes, sample_to_folder

    if report is not None and strategy.endswith(".json"):
        raise InputValueError(f"--report {report}: {strategy} has its own guesses; leave one of them out")
    if certify_always and not certify:
        raise InputValueError("--certify-always: excludes --no-certify; leave one of them out")
    size = options.parse_batch_size(batch_size)
    try:
        with processes() as group, progress_bar() as progress:
            flow = options.load_model(model, group.device(device), dtype)
            classes = options.parse_labels(labels, num, flow, seed)
            settings, origin = options.resolve_settings(flow, guidance, denoise, plain, classes is not None)
            flow = flow.guided(settings.guidance)
            if batch_size == "auto":
                most = min(num, options.MOST_AT_ONCE)
                size = group.on_first(lambda: (None if overwrite else _batch_size_of(out)) or fitting_batch(flow, most))
            started = perf_counter()
            folder = sample_to_folder(
                flow, num, out, classes, seed, strategy=strategy, denoise=settings.denoise, tolerance=tolerance,
                certify="always" if certify_always else certify, batch_size=size, shard_size=shard_size, files=files,
                model=model, report=options.load_report(report, flow), overwrite=overwrite, processes=group,
                progress=None if group.rank else progress,
            )  # fmt: skip
            seconds = perf_counter() - started
    except FirstProcessFailed:
        raise Exit(2) from None  # the first process says why
    if group.rank:
        return None
    manifest, cost, outcome = folder.manifest, folder.cost(), folder.outcome(flow.config.num_tokens)
    certificate = folder.certificate()
    run = asdict(cost) | {
        "images_per_second": num / cost.seconds,
        "certificate": None if certificate is None else float(certificate.max()),
    }
    results = {
        "model": model, "num": num, "batch_size": manifest.batch_size, "seed": seed, "strategy": strategy,
        "settings": options.settings_text(settings), "shards": manifest.num_shards, "processes": group.count,
        "wall_seconds": seconds, "drawn": folder.drawn, "outcome": asdict(outcome), "runs": {strategy: run},
        **machine(flow.var.device),
    }  # fmt: skip
    if compare:
        with progress_bar() as progress:
            comparison = _compare(flow, folder, out / _SHEET, progress)
        results |= comparison | {"runs": comparison["runs"] | results["runs"]}
    else:
        few = min(num, _SHEET_IMAGES)
        shards = [folder.images(i) for i in range(-(-few // manifest.shard_size))]
        save_png(image_grid(scale(torch.cat(shards)[:few]), min(10, num)), out / _SHEET)
    _print(results, origin, None if outcome.has_shortfall else str(outcome))  # else a warning has said so
    if folder.drawn:
        rate, plural = folder.drawn / seconds, "s" * (manifest.num_shards > 1)
        print(f"drew {folder.drawn:,} in {seconds:,.0f} s: {rate:.1f} images a second, processes: {group.count}")
        print(f"wrote {out}: {manifest.num_shards} shard{plural}, manifest.json, strategy.json, {_SHEET}")
    else:
        print(f"all {num:,} were in {out} already, and match their checksums; --overwrite draws them again")
    return results


def _batch_size_of(out: Path) -> int | None:
    """The batch size of the samples in a folder; None if there are none."""
    from jacobiflow.files import MANIFEST
    from jacobiflow.storage import SampleFolder

    return SampleFolder.open(out).manifest.batch_size if (out / MANIFEST).exists() else None


def _compare(flow: ImageFlow, folder: SampleFolder, sheet: Path, progress: Progress) -> dict[str, Any]:
    """Draws the first batch again by the original sampler and by the folder's strategy, and a sheet of both.

    Returns their times and the difference of their denoised images.
    """
    from dataclasses import asdict
    from functools import partial

    from jacobiflow.comparison import compare
    from jacobiflow.denoising import denoised
    from jacobiflow.latents import draw_latents
    from jacobiflow.measuring import paired_error
    from jacobiflow.plots import comparison_sheet, save_png
    from jacobiflow.sampling import draw

    manifest, config = folder.manifest, flow.config
    num, labels = min(manifest.num, manifest.batch_size), folder.labels(0)
    labels = None if labels is None else labels[:num].to(flow.var.device)
    z = draw_latents(num, config.num_tokens, config.token_channels, manifest.seed)
    run = partial(draw, flow, folder.strategy(), z, labels, certify=manifest.certify)
    progress(0, 1, "timing")  # the original sampler may take minutes before the first real call
    comparison = compare(flow, z, labels, {_OURS: run}, repeats=1, warm_up=False, progress=progress)
    rows = [comparison.row(comparison.original), comparison.row(_OURS)]
    original, ours = (row.images for row in rows)
    if manifest.denoise:
        original, ours = (denoised(flow, images, labels, manifest.denoise, 64) for images in (original, ours))
    captions = (comparison.original, manifest.strategy)
    columns = [] if labels is None else [f"class {label}" for label in labels[:_SHEET_IMAGES].tolist()]
    save_png(comparison_sheet(original[:_SHEET_IMAGES], ours[:_SHEET_IMAGES], captions, columns=columns), sheet)
    seconds = rows[0].seconds.median
    return {
        "runs": {comparison.original: {"seconds": seconds, "images_per_second": num / seconds}},
        "speed_up": comparison.speed_up(rows[1], comparison.original),
        "error": asdict(paired_error(ours, original)),
    }


def _print(results: dict[str, Any], origin: str, outcome: str | None) -> None:
    num = results["num"]
    print(f"{results['model']}: {num:,} image{'s' * (num > 1)}, batch size {results['batch_size']}\n{origin}\n")
    rows = []
    for name, run in results["runs"].items():
        counts = [f"{run[key]:,}" if key in run else "" for key in ("network_calls", "token_evaluations")]
        residual = run.get("certificate")
        rows.append([
            name, f"{run['seconds']:.3f}", f"{run['images_per_second']:.1f}", *counts,
            "" if residual is None else f"{residual:.1e}",
        ])  # fmt: skip
    columns = ("strategy", "seconds", "images/s", "network\ncalls", "token\nevaluations", "largest\nresidual")
    show_table(columns, rows)
    print()
    if "error" in results:
        error, original = results["error"], next(iter(results["runs"]))
        print(
            f"{results['speed_up']:.1f} times as fast as the original sampler, {original}\n"
            f"difference from its images: max {error['max']:.1e}, mean {error['mean']:.1e}"
        )
    if outcome is not None:
        print(outcome)
