"""`jacobiflow sample`: draw images."""

from __future__ import annotations

import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from jacobiflow.baselines import original_loop
from jacobiflow.calibration import Report
from jacobiflow.cli import options, paths, settings
from jacobiflow.data import scale
from jacobiflow.denoising import denoise as denoise_images
from jacobiflow.errors import InputValueError
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.flows.settings import SamplingSettings
from jacobiflow.guidance import Guidance
from jacobiflow.measuring import Error, machine, paired_error
from jacobiflow.outcome import Outcome
from jacobiflow.plots import check_picture, comparison_sheet, image_grid, save_png
from jacobiflow.solvers import Certificate
from jacobiflow.storage import (
    CONTENTS,
    MANIFEST,
    SHEET,
    Drawn,
    SampleFolder,
    outcome_of,
    processes,
    sample_to_folder,
    sizes,
    total,
)
from jacobiflow.strategy.memory import batch_bytes, fitting_batch

_SHEET_IMAGES = 100


def sample(
    model: options.Model = "fashion-p2",
    num: Annotated[int, typer.Option("--num", min=1, help="How many images.")] = 16,
    labels: options.Labels = "balanced",
    seed: options.Seed = 0,
    batch_size: options.BatchSize = None,
    shard_size: Annotated[
        int | None,
        typer.Option(
            "--shard-size", min=1, help="Images per shard, which is what a stopped run loses; default: about 1,024."
        ),
    ] = None,
    files: Annotated[
        str, typer.Option("--files", help="npz: a file per shard. png: a file per image, by class.")
    ] = "npz",
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy",
            help="auto (planned for this model, machine and batch size; see jacobiflow plan), sequential, jacobi, "
            "jacobi-J, gs-jacobi:G, gs-jacobi:G-J, window:N, the paper's [Stack-GS-J-Else], or a .json file.",
        ),
    ] = "auto",
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", help="Largest residual |g(x) - x| in any block; default 1e-3, or the file's own."),
    ] = None,
    report: options.ReportFile = None,
    plain: settings.Plain = False,
    guidance: settings.GuidanceWeight = None,
    guidance_on: settings.GuidanceOn = None,
    constant_guidance: settings.ConstantGuidance = False,
    attn_temperature: settings.AttnTemperature = None,
    denoise: settings.Denoise = None,
    certify: Annotated[
        bool, typer.Option(help="Measure every sample's residual in every block, and solve again above the tolerance.")
    ] = True,
    certify_always: Annotated[
        bool,
        typer.Option(
            "--certify-always", help="Measure blocks that are solved token by token too, though exact by construction."
        ),
    ] = False,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Also sample by the loop of the flow's original code, from the same latents."),
    ] = False,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove the samples that are in the folder, and draw all again.")
    ] = False,
    out: Annotated[
        Path, typer.Option("--out", help="Folder for shards/, manifest.json, strategy.json, samples.png.")
    ] = Path("out/samples"),
    json: options.Json = None,
) -> None:
    """Draw images from a flow, in parallel, each certified to a tolerance, into a folder.

    Guidance and denoising are as the model recommends. --guidance replaces its guidance as a whole, --denoise its
    denoising, each leaving the other as it is; --plain draws without both.

    The same command again resumes a run that was stopped. Several processes share the work, and write the same bytes:
    torchrun --nproc-per-node 2 -m -- jacobiflow sample ...

    Example: jacobiflow sample --model fashion-p2 --num 20 --compare --out out/demo
    """
    paths.check(json, out, (*CONTENTS, SHEET), model=model, strategy=strategy, labels=labels, report=report)
    _check_options(strategy, report, compare and not overwrite, out)
    if certify_always and not certify:
        raise InputValueError("--certify-always: excludes --no-certify; leave one of them out")
    given = settings.Given(plain, guidance, guidance_on, constant_guidance, attn_temperature, denoise)
    given.check()
    certificate: Certificate = "always" if certify_always else certify
    size = options.parse_batch_size(batch_size)
    if batch_size != options.AUTO:
        size, shard_size = sizes(num, size, shard_size)
    with processes() as among:
        if compare and among.count > 1:
            raise InputValueError("--compare: is for one process; leave it out, or start without torchrun")
        flow = options.load_model(model, among.device(device), dtype)
        classes = options.parse_labels(labels, num, flow, seed)
        chosen, said = settings.settle(flow, given, labelled=classes is not None)
        if not overwrite:
            among.once(lambda: settings.check_held(out, chosen))
        if size is None:
            most = min(num, options.LIMITS["batch_size"])
            size = among.once(lambda: (None if overwrite else _held(out)) or fitting_batch(flow, most, chosen.guidance))
            size, shard_size = sizes(num, size, shard_size)
        found = _load_report(report, flow, chosen.guidance)
        comparison = _Comparison(flow, chosen, size) if compare else None
        started = time.perf_counter()
        folder = sample_to_folder(
            flow, num, out, classes, seed, strategy=strategy, guidance=chosen.guidance, denoise=chosen.denoise,
            tolerance=tolerance, certify=certificate, batch_size=size, shard_size=shard_size, files=files,  # type: ignore[arg-type]
            model=model, report=found, overwrite=overwrite, among=among, on_shard=comparison,
        )  # fmt: skip
        wall = time.perf_counter() - started
        if among.rank:
            return
    figures = _figures(folder, comparison, flow.var.device)
    figures |= {
        "settings": " ".join(settings.settings_words(chosen)),
        "processes": among.count,
        "wall_seconds": wall,
        "drawn": folder.drawn,
    }
    outcome = outcome_of(folder, flow.config.num_tokens)
    figures["outcome"] = asdict(outcome)
    figures["batch_bytes"] = batch_bytes(flow, size, chosen.guidance)
    save_png(_sheet(folder, comparison), out / SHEET)
    options.report(json, figures)
    _print(figures, said, out, outcome)


def _held(out: Path) -> int | None:
    """The batch size of the samples in the folder, by which a run goes on; `None` where there are none."""
    return SampleFolder.open(out).manifest.batch_size if (out / MANIFEST).exists() else None


def _check_options(strategy: str, report: Path | None, new: bool, out: Path) -> None:
    """**Raises** `ValueError` for options that exclude each other; `new` where `out` must not hold samples yet."""
    if report is not None and strategy.endswith(".json"):
        raise InputValueError(
            f"--report {report}: the strategy in {strategy} has its own guesses; leave one of them out"
        )
    if new and (out / MANIFEST).exists():
        raise InputValueError(
            f"--compare: {out} holds samples already; give --overwrite to draw them again, or another folder as --out"
        )
    check_picture(out / SHEET)


def _load_report(path: Path | None, flow: ImageFlow, guidance: Guidance | None) -> Report | None:
    report = None if path is None else options.load_report(path, flow)
    if report is not None and report.settings.guidance != guidance:
        warnings.warn(f"--report {path}: calibrated under other guidance; its guesses may be poor", stacklevel=3)
    return report


class _Comparison:
    """Draws every shard again by the loop of the flow's original code, with the same guidance and denoising, for
    `--compare`; `name` is that of the loop.
    """

    def __init__(self, flow: ImageFlow, settings: SamplingSettings, batch_size: int) -> None:
        self._flow, self._settings, self._batch_size = flow, settings, batch_size
        self.name, self._loop = original_loop(flow)
        self.exact: list[Tensor] = []
        self.drawn: list[Tensor] = []
        self.classes: list[str] = []  # of the images in `exact` and `drawn`
        self.seconds = 0.0
        self._errors: list[tuple[int, Error]] = []

    def __call__(self, start: int, latents: Tensor, labels: Tensor | None, shard: Drawn) -> None:
        """Draw a shard again."""
        began = time.perf_counter()
        batches = [slice(first, first + self._batch_size) for first in range(0, len(latents), self._batch_size)]
        images = torch.cat([
            self._loop(self._flow, latents[rows], None if labels is None else labels[rows], self._settings.guidance)
            for rows in batches
        ])  # fmt: skip
        self.seconds += time.perf_counter() - began
        images = images.masked_fill(~images.isfinite().all(dim=(1, 2, 3)).view(-1, 1, 1, 1), torch.nan)
        if self._settings.denoise:
            images = denoise_images(self._flow, images, labels, self._settings.denoise, self._batch_size)
        self._errors.append((len(latents), paired_error(shard.images, images)))
        self.exact.append(images[: max(_SHEET_IMAGES - start, 0)])
        self.drawn.append(shard.images[: max(_SHEET_IMAGES - start, 0)])
        self.classes += [
            f"class {label}" for label in (() if labels is None else labels[: len(self.exact[-1])].tolist())
        ]

    def error(self) -> dict[str, float]:
        """The largest and the mean difference of an entry."""
        num = sum(n for n, _ in self._errors)
        return {"max": max(e.max for _, e in self._errors), "mean": sum(n * e.mean for n, e in self._errors) / num}


def _figures(folder: SampleFolder, comparison: _Comparison | None, device: torch.device) -> dict[str, Any]:
    manifest = folder.manifest
    runs = {}
    if comparison is not None:
        runs[comparison.name] = {"seconds": comparison.seconds}
    runs[manifest.strategy] = total([record.figures for record in folder.records()]) | _largest(folder.certificate())
    for run in runs.values():
        run["images_per_second"] = manifest.num / run["seconds"]
    return {
        "model": manifest.model, "num": manifest.num, "batch_size": manifest.batch_size, "seed": manifest.seed,
        "strategy": manifest.strategy, "guidance": 0.0 if manifest.guidance is None else manifest.guidance["weight"],
        "denoise": manifest.denoise, "shards": manifest.num_shards, **machine(device), "runs": runs,
        **({} if comparison is None else {"error": comparison.error()}),
    }  # fmt: skip


def _largest(certificate: Tensor | None) -> dict[str, float | None]:
    return {"certificate": None if certificate is None else float(certificate.max())}


def _sheet(folder: SampleFolder, comparison: _Comparison | None) -> Image.Image:
    """A picture of the first samples; beside those of the original code's loop where both were drawn."""
    if comparison is not None:
        names = (comparison.name, folder.manifest.strategy)
        return comparison_sheet(
            torch.cat(comparison.exact), torch.cat(comparison.drawn), names, columns=comparison.classes
        )
    found: list[Tensor] = []
    for images in folder.batches():
        found.append(scale(images))
        if sum(map(len, found)) >= _SHEET_IMAGES:
            break
    return image_grid(torch.cat(found)[:_SHEET_IMAGES], min(10, folder.manifest.num))


def _residual(run: dict[str, Any]) -> str:
    """The largest residual; "exact" if every block of every sample was solved token by token and not measured."""
    if run["exact"] and not run["certificate"]:
        return "exact"
    return "not asked" if run["certificate"] is None else f"{run['certificate']:.1e}"


def _print(figures: dict[str, Any], said: str, out: Path, outcome: Outcome) -> None:
    console = Console()
    num, batch_size, shards = figures["num"], figures["batch_size"], figures["shards"]
    print(f"{figures['model']}: {num:,} image{'s' * (num > 1)}, batch size {batch_size}")
    print(said)
    options.print_memory(figures["batch_bytes"])
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("strategy", overflow="fold")
    for column in ("seconds", "images/s", "network\ncalls", "token\nevaluations", "largest\nresidual", "re-solved"):
        table.add_column(column, justify="right", min_width=max(map(len, column.split())))
    for name, run in figures["runs"].items():
        counted = () if "network_calls" not in run else (
            f"{run['network_calls']:,}", f"{run['token_evaluations']:,}", _residual(run),
            str(run["resolved_sequentially"]),
        )  # fmt: skip
        table.add_row(escape(name), f"{run['seconds']:.3f}", f"{run['images_per_second']:.1f}", *counted)
    console.print(table)
    if "error" in figures:
        if figures["settings"] != "--plain":
            before = "; seconds are before denoising" if figures["denoise"] else ""
            print(f"both rows: {figures['settings']}{before}")
        (name, own), (_, ours) = ((name, run["seconds"]) for name, run in figures["runs"].items())
        print(
            f"{own / ours:.1f} times as fast as the original code's loop, {name}\n"
            f"error max {figures['error']['max']:.1e}, mean {figures['error']['mean']:.1e}"
        )
    if not outcome.has_shortfall:  # else a warning has said so
        print(outcome)
    if not figures["drawn"]:
        print(f"all {num:,} were in {out} already, and match their checksums; --overwrite draws them again")
        return
    if shards > 1:
        print(
            f"drew {figures['drawn']:,} in {figures['wall_seconds']:,.0f} s by {figures['processes']} "
            f"process{'es' * (figures['processes'] > 1)}: {figures['drawn'] / figures['wall_seconds']:.1f} images a "
            "second"
        )
    print(f"wrote {out}: {shards} shard{'s' * (shards > 1)}, manifest.json, strategy.json, samples.png")
