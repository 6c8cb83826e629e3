"""`jacobiflow evaluate`: scores of a model and its samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jacobiflow.cli import options
from jacobiflow.cli.screen import Table, progress_bar, show
from jacobiflow.errors import InputValueError

if TYPE_CHECKING:
    from torch import Tensor

    from jacobiflow.data import ImageDataset, Noise
    from jacobiflow.evaluation import Statistics
    from jacobiflow.evaluation.features import FeatureFunction
    from jacobiflow.flows.image_flow import ImageFlow
    from jacobiflow.storage import SampleFolder
    from jacobiflow.strategy import Strategy

_FEW = 10_000  # images on either side of what compares each with each
_TABLE = "evaluation.json"

Rows = list[tuple[str, str, str]]  # a measure, its value, and what it is of


def evaluate(
    model: options.Model = "fashion-p2",
    samples: Annotated[Path | None, typer.Option("--samples", help="A folder that jacobiflow sample wrote.")] = None,
    images: Annotated[
        str | None, typer.Option("--images", help=f"Real images to compare with: {options.SOURCES}")
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            "--features",
            help="inception (FID), or FILE.py:FUNCTION for a function from 8-bit images (N, C, H, W) to features "
            "(N, d); or none. Default: inception, if there are real images.",
        ),
    ] = None,
    inception: Annotated[
        Path | None, typer.Option("--inception", help="File of Inception's weights. Default: it is downloaded.")
    ] = None,
    stats: Annotated[
        Path | None,
        typer.Option("--stats", help="Statistics of real images to compare with, such as *_fid_stats.pth."),
    ] = None,
    save_stats: Annotated[
        Path | None, typer.Option("--save-stats", help="Write the statistics of --images to this file.")
    ] = None,
    paired: Annotated[int, typer.Option("--paired", min=0, help="Samples to compare with the sequential loop's.")] = 64,
    test_images: Annotated[
        int, typer.Option("--test-images", min=0, help="Images of --images' test split for likelihoods.")
    ] = 1000,
    noise: Annotated[
        str | None,
        typer.Option("--noise", help="On test images: gaussian, or uniform (dequantised). Default: as in training."),
    ] = None,
    batch_size: options.ImagesAtATime = 64,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    out: Annotated[Path, typer.Option("--out", help="Folder for evaluation.json.")] = Path("out/evaluation"),
    json: options.Json = None,
) -> None:
    """Score a model and its samples.

    FID of the samples, their error and certificates, and the model's likelihood of test images.

    Example: jacobiflow evaluate --model fashion-p2 --samples out/demo --images fashion-512
    """
    from jacobiflow.evaluation import Statistics
    from jacobiflow.evaluation.features import load_features
    from jacobiflow.files import write_json
    from jacobiflow.locking import own_folder

    options.check_files(model, [images, stats, inception, samples], save_stats=save_stats, json=json)
    features = features or ("none" if images is None and stats is None else "inception")
    if samples is None and images is None:
        raise InputValueError("nothing to evaluate: give --samples, a folder that jacobiflow sample wrote, or --images")
    if save_stats is not None and (images is None or features == "none"):
        raise InputValueError(f"--save-stats {save_stats}: give --images and --features, whose statistics they are")
    flow = options.load_model(model, device, dtype)
    folder = None if samples is None else _open_samples(samples, flow)
    strategy = None if folder is None or not paired else folder.strategy()
    test = None if images is None or not test_images else _test_images(flow, images, test_images)
    test_noise = _noise(flow, noise)
    extractor = statistics = real = None
    if features != "none" and (folder is not None or save_stats is not None):
        if images is None and stats is None:
            raise InputValueError(f"--features {features}: give --images or --stats, to compare with")
        extractor = load_features(features, inception)
        statistics = None if stats is None else Statistics.load(stats)
        real = None if images is None else _real_features(flow, extractor, images)
    results: dict[str, Any] = {"model": model, "samples": None if samples is None else str(samples)}
    rows: Rows = []
    with own_folder(out, "evaluation", (_TABLE,)):
        if save_stats is not None and real is not None:
            _save_statistics(real, extractor, save_stats, rows)
        if folder is not None and extractor is not None:
            source = f"the training split of {images}" if statistics is None else str(stats)
            results |= _distances(folder, features, extractor, real, statistics, source, rows)
        if folder is not None:
            results |= _certificates(folder, rows)
            if strategy is not None:
                results |= _paired(folder, flow, strategy, min(paired, folder.manifest.num), batch_size, rows)
        if test is not None:
            results |= _likelihood(flow, test, test_noise, f"of {images}", seed, batch_size, rows)
        write_json(out / _TABLE, results)
    options.write_results(json, results)
    show(Table("Scores", ("measure", "value", "of"), rows, words=(0, 2)))
    print(f"wrote {out / _TABLE}")


def _open_samples(path: Path, flow: ImageFlow) -> SampleFolder:
    """Opens samples. Raises ValueError if they are not whole, or not of this flow."""
    from jacobiflow.flows.fingerprint import check_fingerprint
    from jacobiflow.storage import SampleFolder

    folder = SampleFolder.open(path)
    check_fingerprint(folder.manifest.fingerprint, flow, f"--samples {path}: drawn from", "give that one as --model")
    for problem in folder.problems():
        raise InputValueError(problem)
    return folder


def _real_features(flow: ImageFlow, extractor: FeatureFunction, source: str) -> Tensor:
    """Features of the training split; for Inception a random half is mirrored, as in the original's data loader."""
    import torch

    from jacobiflow.data import load_images
    from jacobiflow.evaluation import InceptionFeatures, extract

    images = load_images(source, flow.config.image_size, flow.config.in_channels).images
    if isinstance(extractor, InceptionFeatures):
        extractor.to(flow.var.device)
        is_mirrored = torch.rand(len(images), generator=torch.Generator().manual_seed(0)) < 0.5
        images = torch.where(is_mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
    with progress_bar() as progress:
        return extract(extractor, [images], progress, len(images))


def _save_statistics(real: Tensor, extractor: FeatureFunction | None, path: Path, rows: Rows) -> None:
    from jacobiflow.evaluation import InceptionFeatures, Statistics

    path.parent.mkdir(parents=True, exist_ok=True)
    Statistics.of(real).save(path, extractor if isinstance(extractor, InceptionFeatures) else None)
    rows.append(("statistics", f"{len(real):,} images", f"written to {path}"))


def _distances(
    folder: SampleFolder, features: str, extractor: FeatureFunction, real: Tensor | None,
    statistics: Statistics | None, source: str, rows: Rows,
) -> dict[str, Any]:  # fmt: skip
    """Fréchet distance to the real images; with their features, kernel distance, precision and recall too."""
    from jacobiflow.evaluation import Statistics, extract, frechet_distance, kernel_distance, precision_recall
    from jacobiflow.evaluation.distances import SMALLEST

    with progress_bar() as progress:
        fake = extract(extractor, folder.batches(), progress, folder.manifest.num)
    if statistics is None:
        assert real is not None  # one of both is given
        statistics = Statistics.of(real)
    name = "FID" if features == "inception" else f"{features.rpartition(':')[2]}-FID"
    distance = frechet_distance(statistics, Statistics.of(fake))
    results = {"features": features, "against": source, "num": len(fake), "frechet_distance": distance}
    rows.append((name, f"{distance:.4f}", f"{len(fake):,} samples, against {source}"))
    if real is not None and min(len(real), len(fake)) >= SMALLEST:
        few, many = real[:_FEW], fake[:_FEW]
        kernel, std = kernel_distance(few, many)
        precision, recall = precision_recall(few, many)
        results |= {"kernel_distance": kernel, "kernel_distance_std": std, "precision": precision, "recall": recall}
        of = f"{len(many):,} samples, {len(few):,} images"
        rows += [
            (name.replace("FID", "KID"), f"{kernel:.5f}", f"+-{std:.5f} over subsets; {of}"),
            ("precision", f"{precision:.3f}", of), ("recall", f"{recall:.3f}", of),
        ]  # fmt: skip
    return results


def _certificates(folder: SampleFolder, rows: Rows) -> dict[str, Any]:
    """The certificates, and the samples that were solved again or lost."""
    num, certificate = folder.manifest.num, folder.certificate()
    resolved, lost = int(folder.resolved().sum()), int(folder.lost().sum())
    certificates = None
    if certificate is None:
        rows.append(("certificate", "none", "drawn with --no-certify"))
    else:
        certificates = {"median": float(certificate.median()), "max": float(certificate.max())}
        of = f"largest of {num:,} samples; median {certificates['median']:.1e}"
        rows.append(("certificate", f"{certificates['max']:.1e}", of))
    rows.append(("re-solved", f"{resolved / num:.2%}", f"{resolved:,} of {num:,} samples, token by token"))
    if lost:
        rows.append(("lost", f"{lost / num:.2%}", "the exact inverse overflows; black images, which count above"))
    return {"resolved_sequentially": resolved, "lost": lost, "certificates": certificates}


def _paired(
    folder: SampleFolder, flow: ImageFlow, strategy: Strategy, num: int, batch_size: int, rows: Rows
) -> dict[str, Any]:
    """The first samples against the sequential loop's at the same latents."""
    from dataclasses import asdict

    import torch

    from jacobiflow.data import quantize
    from jacobiflow.evaluation import fidelity, pixel_difference
    from jacobiflow.latents import draw_latents
    from jacobiflow.sampling import sample

    manifest, config = folder.manifest, flow.config
    shards = range(-(-num // manifest.shard_size))
    stored = torch.cat([folder.images(i) for i in shards])[:num]
    labels = [part for i in shards if (part := folder.labels(i)) is not None]
    classes = torch.cat(labels)[:num] if labels else None
    z = draw_latents(num, config.num_tokens, config.token_channels, manifest.seed)
    guided = flow.guided(manifest.guidance)

    def draw(strategy: str | Strategy) -> Tensor:
        return sample(
            guided, latents=z, labels=classes, strategy=strategy, denoise=manifest.denoise, certify=manifest.certify,
            batch_size=batch_size,
        ).images.cpu()  # fmt: skip

    exact = draw("sequential")
    errors = fidelity(draw(strategy), exact)
    on_disk = pixel_difference(stored, quantize(exact.nan_to_num(nan=-1.0)))
    of = f"{num:,} samples, against the sequential loop"
    rows += [
        ("largest error", f"{errors.max:.1e}", of), ("RMS error", f"{errors.rms:.1e}", of),
        ("PSNR", f"{errors.psnr:.1f} dB", of),
        ("8-bit pixels", f"{on_disk.share:.3%}", f"of the stored images differ, by {on_disk.levels} at most"),
    ]  # fmt: skip
    return {"paired": asdict(errors), "stored": asdict(on_disk)}


def _noise(flow: ImageFlow, kind: str | None) -> Noise:
    """The noise of test images that `--noise` names; that of the flow's training by default."""
    from jacobiflow.data import Noise

    std = flow.config.noise_std
    if kind not in (None, "gaussian", "uniform"):
        raise InputValueError(f"--noise {kind}: give gaussian or uniform")
    if kind == "gaussian" and not std:
        raise InputValueError("--noise gaussian: this flow's noise_std is 0; give uniform")
    return Noise("gaussian", std) if std and kind != "uniform" else Noise("uniform")


def _test_images(flow: ImageFlow, source: str, num: int) -> ImageDataset:
    """The first `num` test images, after a check that the flow has their classes."""
    from dataclasses import replace

    from jacobiflow.data import load_images

    data = load_images(source, flow.config.image_size, flow.config.in_channels, "test")
    labels = None if data.labels is None else data.labels[:num]
    if flow.config.num_classes and labels is not None:
        flow.check_labels(labels, len(labels))
    return replace(data, images=data.images[:num], labels=labels)


def _likelihood(
    flow: ImageFlow, test: ImageDataset, noise: Noise, source: str, seed: int, batch_size: int, rows: Rows
) -> dict[str, Any]:
    """Bits per dimension and class accuracy of test images."""
    from jacobiflow.evaluation import bayes_accuracy, bits_per_dim

    is_gaussian = noise.kind == "gaussian"
    kind = f"noisy images, noise {noise.std:g}" if is_gaussian else "uniformly dequantised images"
    of = f"{len(test):,} {kind}, {source}"
    with progress_bar() as progress:
        bits = bits_per_dim(flow, test, noise, seed, batch_size, progress)
        results = {"test_images": len(test), "bits_per_dim_noisy" if is_gaussian else "bits_per_dim": bits}
        rows.append(("bits per dimension", f"{bits:.3f}", of))
        if flow.config.num_classes and test.labels is not None:
            accuracy = results["bayes_accuracy"] = bayes_accuracy(flow, test, noise, seed, batch_size, progress)
            rows.append(("class accuracy", f"{accuracy:.1%}", f"by Bayes' rule; {of}"))
    return results
