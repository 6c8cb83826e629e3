"""`jacobiflow sample`: draw images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jacobiflow.cli import options
from jacobiflow.cli.screen import Table, progress_bar, show

if TYPE_CHECKING:
    from torch import Tensor

    from jacobiflow.flows.guidance import SamplingSettings
    from jacobiflow.flows.image_flow import ImageFlow
    from jacobiflow.progress import Progress
    from jacobiflow.storage import SampleFolder

_SHEET = "samples.png"
_SHEET_IMAGES = 100
_OURS = "ours"
_MOST = 100_000_000


def sample(
    model: options.Model = "fashion-p2",
    num: Annotated[int, typer.Option("--num", min=1, max=_MOST, help="How many images.")] = 16,
    labels: options.Labels = "balanced",
    seed: options.Seed = 0,
    batch_size: options.BatchSize = None,
    shard_size: Annotated[
        int | None,
        typer.Option("--shard-size", min=1, help="Images in a file, which a stopped run loses. Default: about 1,024."),
    ] = None,
    files: Annotated[
        str, typer.Option("--files", help="npz: a file per shard. png: also one per image, by class.")
    ] = "npz",
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy",
            help="auto (planned for this model, machine and batch size), sequential, jacobi, jacobi-J, gs-jacobi:G, "
            "gs-jacobi:G-J, window:N, the paper's [Stack-GS-J-Else], or a .json file.",
        ),
    ] = "auto",
    tolerance: options.Tolerance = None,
    report: options.ReportFile = None,
    guidance: options.GuidanceOrRecommended = None,
    denoise: options.DenoiseOrRecommended = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Without the guidance and the denoising that the model recommends.")
    ] = False,
    certify: Annotated[
        bool, typer.Option(help="Measure every sample's residual in every block, and solve again above the tolerance.")
    ] = True,
    certify_always: Annotated[
        bool, typer.Option("--certify-always", help="Also measure blocks that are exact by construction.")
    ] = False,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Also draw the first batch by the original sampler, and compare."),
    ] = False,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Draw all samples again, in place of those in the folder.")
    ] = False,
    out: Annotated[
        Path, typer.Option("--out", help="Folder for shards/, manifest.json, strategy.json, samples.png.")
    ] = Path("out/samples"),
    json: options.Json = None,
) -> None:
    """Draw images into a folder, each certified.

    Guidance and denoising are as the model recommends; --guidance and --denoise replace one each, --plain both.

    The same command again resumes a run that was stopped. Several processes share the work, and write the same bytes:
    torchrun --nproc-per-node 2 -m -- jacobiflow sample ...

    Example: jacobiflow sample --model fashion-p2 --num 20 --compare --out out/demo
    """
    import time

    from jacobiflow.errors import InputValueError
    from jacobiflow.memory import fitting_batch
    from jacobiflow.plots import save_png
    from jacobiflow.storage import FirstProcessFailed, processes, sample_to_folder

    options.check_files(model, [strategy, labels, report], json=json)
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
            started = time.perf_counter()
            folder = sample_to_folder(
                flow, num, out, classes, seed, strategy=strategy, denoise=settings.denoise,
                tolerance=tolerance, certify="always" if certify_always else certify, batch_size=size,
                shard_size=shard_size, files=files, model=model, overwrite=overwrite, processes=group,  # type: ignore[arg-type]
                report=options.load_report(report, flow),
                progress=None if group.rank else progress,
            )  # fmt: skip
            seconds = time.perf_counter() - started
    except FirstProcessFailed:
        raise typer.Exit(2) from None  # the first process says why
    if group.rank:
        return
    results = _results(flow, folder, settings)
    results |= {"processes": group.count, "wall_seconds": seconds, "drawn": folder.drawn}
    if compare:
        with progress_bar() as progress:
            compared = _compare(flow, folder, settings, out / _SHEET, progress)
        results |= compared | {"runs": compared["runs"] | results["runs"]}
    else:
        save_png(_sheet(folder), out / _SHEET)
    options.write_results(json, results)
    outcome = folder.outcome(flow.config.num_tokens)
    _print(results, origin, out, None if outcome.has_shortfall else str(outcome))  # else a warning has said so


def _batch_size_of(out: Path) -> int | None:
    """The batch size of the samples in a folder; None if there are none."""
    from jacobiflow.locking import MANIFEST
    from jacobiflow.storage import SampleFolder

    return SampleFolder.open(out).manifest.batch_size if (out / MANIFEST).exists() else None


def _results(flow: ImageFlow, folder: SampleFolder, settings: SamplingSettings) -> dict[str, Any]:
    from dataclasses import asdict

    from jacobiflow.measuring import machine

    manifest, certificate, cost = folder.manifest, folder.certificate(), folder.cost()
    run = asdict(cost) | {
        "certificate": None if certificate is None else float(certificate.max()),
        "images_per_second": manifest.num / cost.seconds,
    }
    return {
        "model": manifest.model, "num": manifest.num, "batch_size": manifest.batch_size, "seed": manifest.seed,
        "strategy": manifest.strategy, "settings": options.settings_text(settings), "shards": manifest.num_shards,
        **machine(flow.var.device), "runs": {manifest.strategy: run},
        "outcome": asdict(folder.outcome(flow.config.num_tokens)),
    }  # fmt: skip


def _compare(
    flow: ImageFlow, folder: SampleFolder, settings: SamplingSettings, sheet: Path, progress: Progress
) -> dict[str, Any]:
    """Draws the first batch again by the original sampler and by the folder's strategy, and a sheet of both.

    Returns their times and the difference of their denoised images.
    """
    from dataclasses import asdict
    from functools import partial

    from jacobiflow.comparison import compare
    from jacobiflow.denoising import denoise
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
    sides = [row.images for row in rows]
    if settings.denoise:
        sides = [denoise(flow, _lost_as_nan(images), labels, settings.denoise) for images in sides]
    original, ours = map(_lost_as_nan, sides)
    captions = (comparison.original, manifest.strategy)
    columns = [] if labels is None else [f"class {label}" for label in labels[:_SHEET_IMAGES].tolist()]
    save_png(comparison_sheet(original[:_SHEET_IMAGES], ours[:_SHEET_IMAGES], captions, columns=columns), sheet)
    seconds = rows[0].seconds.median
    return {
        "runs": {comparison.original: {"num": num, "seconds": seconds, "images_per_second": num / seconds}},
        "speed_up": comparison.speed_up(rows[1], comparison.original),
        "error": asdict(paired_error(ours, original)),
    }  # fmt: skip


def _lost_as_nan(images: Tensor) -> Tensor:
    import torch

    finite = images.isfinite().all(dim=(1, 2, 3))
    return images.masked_fill(~finite.view(-1, 1, 1, 1), torch.nan)


def _sheet(folder: SampleFolder) -> Any:
    """A picture of the first samples."""
    import torch

    from jacobiflow.data import scale
    from jacobiflow.plots import image_grid

    parts: list[Tensor] = []
    for images in folder.batches():
        parts.append(scale(images))
        if sum(map(len, parts)) >= _SHEET_IMAGES:
            break
    return image_grid(torch.cat(parts)[:_SHEET_IMAGES], min(10, folder.manifest.num))


def _print(results: dict[str, Any], origin: str, out: Path, outcome: str | None) -> None:
    num, shards, drawn = results["num"], results["shards"], results["drawn"]
    print(
        f"{results['model']}: {num:,} image{'s' * (num > 1)}, batch size {results['batch_size']}", origin, "", sep="\n"
    )
    rows = []
    for name, run in results["runs"].items():
        row = [name, f"{run['seconds']:.3f}", f"{run['images_per_second']:.1f}"]
        if "network_calls" in run:
            row += [f"{run['network_calls']:,}", f"{run['token_evaluations']:,}", _residual(run)]
            row.append(str(run["resolved_sequentially"]))
        rows.append(row)
    columns = ("strategy", "seconds", "images/s", "network\ncalls", "token\nevaluations", "largest\nresidual",
               "re-solved")  # fmt: skip
    show(Table("", columns, rows))
    print()
    if "error" in results:
        error, original = results["error"], next(iter(results["runs"]))
        print(
            f"{results['speed_up']:.1f} times as fast as the original sampler, {original}\n"
            f"difference from its images: max {error['max']:.1e}, mean {error['mean']:.1e}"
        )
    if outcome is not None:
        print(outcome)
    if not drawn:
        print(f"all {num:,} were in {out} already, and match their checksums; --overwrite draws them again")
        return
    if shards > 1:
        seconds, count = results["wall_seconds"], results["processes"]
        print(f"drew {drawn:,} in {seconds:,.0f} s: {drawn / seconds:.1f} images a second, processes: {count}")
    print(f"wrote {out}: {shards} shard{'s' * (shards > 1)}, manifest.json, strategy.json, samples.png")


def _residual(run: dict[str, Any]) -> str:
    """The largest residual; "exact" if every block of every sample was solved token by token and not measured."""
    if run["exact"] and not run["certificate"]:
        return "exact"
    return "not measured" if run["certificate"] is None else f"{run['certificate']:.1e}"
