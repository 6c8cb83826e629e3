"""`jacobiflow evaluate`: how good a model and its samples are."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from jacobiflow.cli import options, pages, paths
from jacobiflow.cli.progress import progress
from jacobiflow.cli.real_images import real_images
from jacobiflow.cli.tables import show
from jacobiflow.data import ImageDataset, Noise, quantize, scale
from jacobiflow.errors import InputValueError
from jacobiflow.evaluation import (
    NAMES,
    InceptionFeatures,
    Statistics,
    bayes_accuracy,
    bits_per_dim,
    certificate_histogram,
    extract,
    fidelity,
    frechet_distance,
    kernel_distance,
    pixel_difference,
    precision_recall,
)
from jacobiflow.evaluation.distances import LEAST
from jacobiflow.files import check_ours, write_json
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.guidance import Guidance
from jacobiflow.latents import draw_latents
from jacobiflow.locking import locked
from jacobiflow.plots import Picture, Table, certificate_figure, check_picture, image_grid, save_png
from jacobiflow.sampling import sample
from jacobiflow.storage import SampleFolder
from jacobiflow.strategy import Strategy

_FEW = 10_000  # images on either side of what compares each with each
_KINDS = ("gaussian", "uniform")
_SAMPLES = 20  # on the page of --html
_PICTURE, _TABLE = "certificates.png", "evaluation.json"

Rows = list[tuple[str, str, str]]


def evaluate(
    context: typer.Context,
    model: options.Model = "fashion-p2",
    samples: options.SamplesFolder = None,
    images: options.RealImages = None,
    features: Annotated[
        str,
        typer.Option("--features", help=f"{options.FEATURES}, inception (FID), or none."),
    ] = "fashion",
    inception: options.Inception = None,
    stats: options.Stats = None,
    save_stats: Annotated[
        Path | None, typer.Option("--save-stats", help="Write the statistics of --images to this file.")
    ] = None,
    paired: Annotated[
        int, typer.Option("--paired", help="Samples to solve sequentially too, and to compare with; 0 for none.")
    ] = 64,
    test_images: Annotated[
        int, typer.Option("--test-images", help="Images of --images' test split for likelihoods; 0 for none.")
    ] = 1000,
    noise: Annotated[
        str | None,
        typer.Option("--noise", help="On test images: gaussian, or uniform (dequantised); default: as in training."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images in the network at a time.")] = 64,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    out: Annotated[Path, typer.Option("--out", help="Folder for evaluation.json, certificates.png.")] = Path(
        "out/evaluation"
    ),
    json: options.Json = None,
    html: options.Html = None,
) -> None:
    """Score a model: FID of its samples, their error and certificates, and its likelihood of test images.

    Example: jacobiflow evaluate --model fashion-p2 --samples out/demo --images fashion-512 --html page.html
    """
    paths.check(
        json, out, ("evaluation.json", "certificates.png"), save_stats=save_stats, html=html, model=model,
        samples=samples, images=images, stats=stats, inception=inception,
    )  # fmt: skip
    if samples is None and images is None:
        raise InputValueError("nothing to evaluate: give --samples, a folder that jacobiflow sample wrote, or --images")
    if save_stats is not None and images is None:
        raise InputValueError(f"--save-stats {save_stats}: give --images, whose statistics they are")
    _check(features, noise, save_stats, paired, test_images, batch_size)
    flow = options.load_model(model, device, dtype)
    folder = None if samples is None else options.open_samples(samples, flow)
    if folder is not None:
        folder.check_flow(flow)
    if folder is not None and paired and folder.manifest.strategy_sha256 is None:
        drawn_by = folder.manifest.strategy
        raise InputValueError(f"--paired {paired}: {samples} was drawn by {drawn_by}, not a strategy; give --paired 0")
    exact = None if folder is None or not paired else folder.strategy()
    test = None if images is None or not test_images else _test_images(flow, images, test_images)
    added = _noise(flow, noise)
    figures: dict[str, Any] = {"model": model, "samples": None if samples is None else str(samples)}
    rows: Rows = []
    with locked(out):
        check_picture(out / _PICTURE)
        check_ours(out / _TABLE, figures)
        if features != "none" and (folder is not None or save_stats is not None):
            figures |= _distances(folder, flow, features, inception, images, stats, save_stats, rows)
        histogram, pictures = None, []
        if folder is not None:
            figures |= _certificates(folder, rows)
            histogram = figures["certificates"]
            if exact is not None:
                figures |= _paired(folder, flow, exact, min(paired, folder.manifest.num), batch_size, rows)
        if test is not None:
            figures |= _likelihood(flow, test, added, f"of {images}", seed, batch_size, rows)
        (out / _PICTURE).unlink(missing_ok=True)
        if histogram is not None and folder is not None:
            pictures = [_histogram(histogram, folder, exact)]
            save_png(pictures[0].image, out / _PICTURE)
        write_json(out / _TABLE, figures)
    options.report(json, figures)
    table = Table("What was measured", ("measure", "value", "of"), rows, words=(0, 2))
    show(table)
    if html is not None:
        pages.write(
            html, context, flow, f"Evaluation of {model}", _summary(folder, images), figures, [table],
            [*pictures, *_sheet(folder)],
        )  # fmt: skip
    print(f"wrote {out / _TABLE}" + ("" if histogram is None else f" and {out / _PICTURE}"))


def _summary(folder: SampleFolder | None, images: str | None) -> str:
    of = [] if images is None else [f"images of {images}"]
    if folder is not None:
        of.insert(0, f"samples in {folder.path} (drawn with {shlex.join(options.sample_words(folder.manifest))})")
    return f"How good the model is, by {' and '.join(of)}."


def _histogram(histogram: dict[str, Any], folder: SampleFolder, strategy: Strategy | None) -> Picture:
    asked = folder.manifest.tolerance
    if asked is None and strategy is not None:
        asked = strategy.tolerance  # what a plan was made for
    return Picture("Certificates of the samples", certificate_figure(histogram, asked))


def _sheet(folder: SampleFolder | None) -> list[Picture]:
    """The first samples."""
    if folder is None:
        return []
    images = scale(folder.images(0))[:_SAMPLES]
    return [Picture(f"The first {len(images)} samples", image_grid(images, min(len(images), _SAMPLES // 2)))]


def _check(
    features: str, noise: str | None, save_stats: Path | None, paired: int, test_images: int, batch_size: int
) -> None:
    """**Raises** `ValueError` for an unknown name or a number that is too small."""
    if features not in (*NAMES, "none") or (features == "none" and save_stats is not None):
        raise InputValueError(
            f"--features {features}: give one of {', '.join(NAMES)}" + ("" if save_stats else ", or none")
        )
    if noise not in (None, *_KINDS):
        raise InputValueError(f"--noise {noise}: give {' or '.join(_KINDS)}")
    for option, value, least in (
        ("--paired", paired, 0), ("--test-images", test_images, 0), ("--batch-size", batch_size, 1),
    ):  # fmt: skip
        if value < least:
            raise InputValueError(
                f"{option} {value}: give {'a positive number' if least else '0 or a positive number'}"
            )


def _distances(
    folder: SampleFolder | None, flow: ImageFlow, kind: str, inception: Path | None, images: str | None,
    stats: Path | None, save_stats: Path | None, rows: Rows,
) -> dict[str, Any]:  # fmt: skip
    """Fréchet distance to the real images; where they are at hand, kernel distance, precision and recall."""
    name, real = NAMES[kind], real_images(flow, kind, inception, images, stats)
    if save_stats is not None and real.features is not None:
        save_stats.parent.mkdir(parents=True, exist_ok=True)
        weights = real.extractor if isinstance(real.extractor, InceptionFeatures) else None
        Statistics.of(real.features).save(save_stats, weights)
        rows.append(("statistics", f"{len(real.features):,} images", f"written to {save_stats}"))
    if folder is None:
        return {}
    with progress("features of samples", folder.manifest.num) as advance:
        fake = extract(real.extractor, folder.batches(), advance)
    found: dict[str, Any] = {"features": kind, "against": real.source, "num": len(fake)}
    found["frechet_distance"] = frechet_distance(real.statistics, Statistics.of(fake))
    rows.append((name, f"{found['frechet_distance']:.4f}", f"{len(fake):,} samples, against {real.source}"))
    if real.features is not None and min(len(real.features), len(fake)) >= LEAST:
        few, many = real.features[:_FEW], fake[:_FEW]
        found["kernel_distance"], found["kernel_distance_std"] = kernel_distance(few, many)
        found["precision"], found["recall"] = precision_recall(few, many)
        of = f"{len(many):,} samples, {len(few):,} images"
        spread = f"+-{found['kernel_distance_std']:.5f} over subsets"
        rows.append((name.replace("FID", "KID"), f"{found['kernel_distance']:.5f}", f"{spread}; {of}"))
        rows += [(measure, f"{found[measure]:.3f}", of) for measure in ("precision", "recall")]
    return found


def _certificates(folder: SampleFolder, rows: Rows) -> dict[str, Any]:
    """The histogram of certificates, and what was solved again or lost."""
    num, certificate = folder.manifest.num, folder.certificate()
    resolved, lost = int(folder.resolved().sum()), int(folder.lost().sum())
    found: dict[str, Any] = {"resolved_sequentially": resolved, "lost": lost, "certificates": None}
    if certificate is None:
        rows.append(("certificate", "none", "drawn with --no-certify"))
    else:
        histogram = certificate_histogram(certificate)
        found["certificates"] = histogram
        of = f"largest of {num:,} samples; median {histogram['median']:.1e}"
        rows.append(("certificate", f"{histogram['max']:.1e}", of))
    rows.append(("re-solved", f"{resolved / num:.2%}", f"{resolved:,} of {num:,} samples, token by token"))
    if lost:
        rows.append(("lost", f"{lost / num:.2%}", "the exact inverse overflows; black images, which count above"))
    return found


def _paired(
    folder: SampleFolder, flow: ImageFlow, strategy: Strategy, num: int, batch_size: int, rows: Rows
) -> dict[str, Any]:
    """The first samples against the sequential loop's at the same latents."""
    manifest, config = folder.manifest, flow.config
    stored = torch.cat(list(_until(folder.batches(), num)))[:num]
    labels = [folder.labels(i) for i in range(-(-num // manifest.shard_size))]
    classes = None if labels[0] is None else torch.cat([part for part in labels if part is not None])[:num]
    z = draw_latents(num, config.num_tokens, config.token_channels, manifest.seed)
    guidance = None if manifest.guidance is None else Guidance(**manifest.guidance)

    def draw(strategy: str | Strategy) -> Tensor:
        return sample(
            flow, latents=z, labels=classes, strategy=strategy, guidance=guidance, denoise=manifest.denoise,
            certify=manifest.certify, batch_size=batch_size,
        ).images.cpu()  # fmt: skip

    exact = draw("sequential")
    found = fidelity(draw(strategy), exact)
    on_disk = pixel_difference(stored, quantize(exact.nan_to_num(nan=-1.0)))
    of = f"{num:,} samples, against the sequential loop at the same latents"
    rows += [
        ("largest error", f"{found.max:.1e}", of), ("RMS error", f"{found.rms:.1e}", of),
        ("PSNR", f"{found.psnr:.1f} dB", of),
        ("8-bit pixels", f"{on_disk.share:.3%}", f"differ, by {on_disk.levels} at most; the stored images, {of}"),
    ]  # fmt: skip
    return {"paired": asdict(found), "stored": asdict(on_disk)}


def _until(batches: Iterator[Tensor], num: int) -> Iterator[Tensor]:
    for images in batches:
        yield images
        num -= len(images)
        if num <= 0:
            return


def _noise(flow: ImageFlow, kind: str | None) -> Noise:
    """The noise of test images that `--noise` names; that of the flow's training by default."""
    std = flow.config.noise_std
    if kind == "gaussian" and not std:
        raise InputValueError("--noise gaussian: this flow's noise_std is 0; give uniform")
    return Noise("gaussian", std) if std and kind != "uniform" else Noise("uniform")


def _test_images(flow: ImageFlow, images: str, num: int) -> ImageDataset:
    """The first `num` test images. **Raises** `ValueError` for classes that the flow does not have."""
    config = flow.config
    data = options.read_images(images, config.image_size, config.in_channels, "test")
    if config.num_classes and data.labels is not None and int(data.labels.max()) >= config.num_classes:
        raise InputValueError(
            f"--images {images}: has classes up to {int(data.labels.max())}, the model {config.num_classes} classes; "
            "give others, or --test-images 0"
        )
    return replace(data, images=data.images[:num], labels=None if data.labels is None else data.labels[:num])


def _likelihood(
    flow: ImageFlow, test: ImageDataset, noise: Noise, source: str, seed: int, batch_size: int, rows: Rows
) -> dict[str, Any]:
    """Bits per dimension and class accuracy of test images."""
    gaussian = noise.kind == "gaussian"
    words = f"noisy images, noise {noise.std:g}" if gaussian else "uniformly dequantised images"
    of = f"{len(test):,} {words}, {source}"
    name = "bits_per_dim_noisy" if gaussian else "bits_per_dim"
    with progress("bits per dimension", len(test)) as advance:
        found: dict[str, Any] = {
            name: bits_per_dim(flow, test, noise, seed, batch_size, advance), "test_images": len(test)
        }  # fmt: skip
    rows.append(("bits per dimension", f"{found[name]:.3f}", of))
    if flow.config.num_classes and test.labels is not None:
        with progress("class accuracy", len(test)) as advance:
            found["bayes_accuracy"] = bayes_accuracy(flow, test, noise, seed, batch_size, advance)
        rows.append(("class accuracy", f"{found['bayes_accuracy']:.1%}", f"by Bayes' rule; {of}"))
    return found
