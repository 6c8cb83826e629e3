"""`jacobiflow train`: fit a flow to images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jacobiflow.cli import options
from jacobiflow.cli.screen import progress_bar
from jacobiflow.errors import InputValueError

if TYPE_CHECKING:
    from jacobiflow.flows.image_flow import ImageFlow
    from jacobiflow.training import StepReport

_SHEET = "samples-{:06d}.png"
_REPORT_EVERY = 50  # steps


def train(
    images: options.Images,
    out: Annotated[Path, typer.Option("--out", help="Folder of the model, its checkpoint, metrics and samples.")],
    steps: Annotated[int, typer.Option("--steps", help="Optimiser steps in all, those of earlier runs included.")],
    flow: Annotated[str, typer.Option("--flow", help="tarflow, or maf: a masked autoregressive flow.")] = "tarflow",
    patch_size: Annotated[
        int | None, typer.Option("--patch-size", help="tarflow: side of a patch in pixels; default 2.")
    ] = None,
    channels: Annotated[
        int, typer.Option("--channels", help="Width of the transformers; maf: of the hidden layers.")
    ] = 128,
    blocks: Annotated[int, typer.Option("--blocks", help="Number of flow blocks.")] = 8,
    layers: Annotated[int, typer.Option("--layers", help="Transformer layers in a block; maf: hidden layers.")] = 2,
    head_dim: Annotated[
        int | None, typer.Option("--head-dim", help="tarflow: width of an attention head; default 64.")
    ] = None,
    volume_preserving: Annotated[
        bool, typer.Option("--volume-preserving", help="tarflow: shifts only, and a learned prior variance.")
    ] = False,
    image_size: Annotated[int, typer.Option("--image-size", help="Side of the images in pixels.")] = 28,
    image_channels: Annotated[int, typer.Option("--image-channels", help="1 for grey, 3 for colour.")] = 1,
    unconditional: Annotated[bool, typer.Option("--unconditional", help="Do not use the images' labels.")] = False,
    noise: Annotated[
        str | None,
        typer.Option("--noise", help="gaussian, or uniform for dequantisation. Default: gaussian; maf: uniform."),
    ] = None,
    noise_std: Annotated[
        float | None, typer.Option("--noise-std", help="Standard deviation of gaussian noise; default 0.1.")
    ] = None,
    mirror: Annotated[bool, typer.Option("--mirror", help="Mirror half of the images.")] = False,
    shift: Annotated[int, typer.Option("--shift", help="Shift images by up to so many pixels.")] = 0,
    hue: Annotated[float, typer.Option("--hue", help="Turn colours by an angle of up to so many degrees.")] = 0.0,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images in a step.")] = 64,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Peak rate of AdamW.")] = 1e-3,
    warmup: Annotated[int, typer.Option("--warmup", help="Steps of linear warm-up.")] = 200,
    ema: Annotated[float, typer.Option("--ema", help="Decay of the averaged weights.")] = 0.999,
    clip: Annotated[float, typer.Option("--clip", help="Largest gradient norm.")] = 1.0,
    drop_label: Annotated[float, typer.Option("--drop-label", help="Share of labels dropped.")] = 0.1,
    bf16: Annotated[bool, typer.Option(help="Autocast to bfloat16.")] = True,
    checkpoint_every: Annotated[int, typer.Option("--checkpoint-every", help="Steps between checkpoints.")] = 100,
    sample_every: Annotated[int, typer.Option("--sample-every", help="Steps between sheets of samples.")] = 500,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    json: options.Json = None,
) -> None:
    """Train a TarFlow or a MAF.

    The same command again resumes a run that was stopped.

    Example: jacobiflow train --images fashion-mnist --out runs/fashion --steps 6000
    """
    import sys
    from dataclasses import asdict

    import torch

    from jacobiflow.checks import check_device
    from jacobiflow.data import Augmentation, Noise, load_images
    from jacobiflow.flows.registry import FLOWS
    from jacobiflow.measuring import machine
    from jacobiflow.plots import image_grid, save_png
    from jacobiflow.sampling import sample
    from jacobiflow.training import TrainConfig, read_metrics
    from jacobiflow.training import train as fit

    options.check_files(None, [images], json=json)
    data = load_images(images, image_size, image_channels)
    if flow not in FLOWS:
        raise InputValueError(f"--flow {flow}: give one of {', '.join(sorted(FLOWS))}")
    flow_class = FLOWS[flow]
    noise, extra = _extra_options(
        flow_class, noise, patch_size=patch_size, head_dim=head_dim, volume_preserving=volume_preserving or None,
        noise_std=noise_std,
    )  # fmt: skip
    config = flow_class.config_from_options(
        in_channels=image_channels, image_size=image_size, channels=channels, blocks=blocks, layers=layers,
        num_classes=0 if unconditional or data.labels is None else int(data.labels.max()) + 1, **extra,
    )  # fmt: skip
    settings = TrainConfig(
        steps=steps, noise=Noise(noise, config.noise_std),  # type: ignore[arg-type]
        augmentation=Augmentation(mirror, shift, hue), batch_size=batch_size, learning_rate=learning_rate,
        warmup=warmup, ema=ema, clip=clip, drop_label=drop_label, bf16=bf16, seed=seed,
        checkpoint_every=checkpoint_every, sample_every=sample_every,
    )  # fmt: skip
    place = check_device(device, here=True)
    torch.manual_seed(seed)
    model = flow_class(config)

    def on_step(report: StepReport) -> None:
        if report.step % _REPORT_EVERY == 0:
            metrics = f"loss {report.loss:+.4f}  {report.bits_per_dim:.3f} bits/dim  {report.seconds:.0f} s"
            print(f"step {report.step}/{steps}  {metrics}", file=sys.stderr)

    def on_sample(average: ImageFlow, step: int) -> None:
        labels = options.parse_labels("balanced", 20, average, seed)
        images = sample(average, num=20, labels=labels, seed=seed, strategy="sequential").images
        save_png(image_grid(images, columns=10), out / _SHEET.format(step))

    with _sigterm_interrupts(), progress_bar() as progress:
        fit(model.to(place), data, settings, out, on_step, on_sample, progress)
    results = {"model": str(out), "flow": flow, "images": len(data), **asdict(config), "training": asdict(settings)}
    metrics = read_metrics(out)  # empty if no step was left to do and the file was deleted
    last = metrics[-1] if metrics else None
    options.write_results(json, results | {"last_step": None if last is None else asdict(last), **machine(place)})
    if last is not None:
        print(f"{last.step:,} steps: loss {last.loss:+.4f}, {last.bits_per_dim:.3f} bits per dimension")
    print(f"wrote the model folder {out}")


def _extra_options(flow_class: type[ImageFlow], noise: str | None, **options: Any) -> tuple[str, dict[str, Any]]:
    """The kind of noise, and the arguments of `config_from_options` that only some flows have; None is left out.

    A flow without `noise_std` is trained on uniform noise only. Raises ValueError for options that the flow lacks.
    """
    import inspect

    parameters = inspect.signature(flow_class.config_from_options).parameters
    extra = {name: value for name, value in options.items() if value is not None}
    lacking = {name: value for name, value in extra.items() if name not in parameters}
    has_gaussian = "noise_std" in parameters
    if noise == "gaussian" and not has_gaussian:
        lacking["noise"] = noise
    if lacking:
        words = [f"--{name.replace('_', '-')}{'' if value is True else f' {value}'}" for name, value in lacking.items()]
        raise InputValueError(f"{', '.join(words)}: not an option of --flow {flow_class.model_type}; leave it out")
    noise = noise or ("gaussian" if has_gaussian else "uniform")
    if has_gaussian and noise == "uniform":
        extra["noise_std"] = 0.0
    return noise, extra


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Ends training on a scheduler's SIGTERM as on Ctrl-C: with a checkpoint."""
    import signal

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
