"""`jacobiflow train`: fit a flow to images."""

from __future__ import annotations

import inspect
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jacobiflow import sampling
from jacobiflow.checks import check_device
from jacobiflow.cli import options, paths
from jacobiflow.data import Augmentation, Noise
from jacobiflow.errors import InputValueError
from jacobiflow.flows.folder import CONFIG, REPORTS, WEIGHTS
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.flows.registry import find_flow, flow_names
from jacobiflow.measuring import machine
from jacobiflow.memory import shortage
from jacobiflow.plots import check_picture, image_grid, save_png
from jacobiflow.training import StepReport, TrainConfig, read_metrics
from jacobiflow.training import train as fit

_SHEET = "samples-{:06d}.png"


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
    """Train a TarFlow or a MAF; started again with the same --out, it goes on where it stopped.

    Example: jacobiflow train --images fashion-mnist --out runs/fashion --steps 6000
    """
    paths.check(
        json, out, (CONFIG, WEIGHTS, *REPORTS, "checkpoint.pt", "metrics.jsonl", "samples-*.png"), images=images
    )
    flow_class = _flow_class(flow)
    data = options.read_images(images, image_size, image_channels)
    noise = noise or ("gaussian" if "noise_std" in _parameters(flow_class) else "uniform")
    choices = _choices(
        flow_class, noise, patch_size=patch_size, head_dim=head_dim, volume_preserving=volume_preserving or None,
        noise_std=noise_std,
    )  # fmt: skip
    config = flow_class.config_from_options(
        in_channels=image_channels, image_size=image_size, channels=channels, blocks=blocks, layers=layers,
        num_classes=0 if unconditional or data.labels is None else int(data.labels.max()) + 1, **choices,
    )  # fmt: skip
    settings = TrainConfig(
        steps=steps, noise=Noise(noise, config.noise_std),  # type: ignore[arg-type]
        augmentation=Augmentation(mirror, shift, hue), batch_size=batch_size, learning_rate=learning_rate,
        warmup=warmup, ema=ema, clip=clip, drop_label=drop_label, bf16=bf16, seed=seed,
        checkpoint_every=checkpoint_every, sample_every=sample_every,
    )  # fmt: skip
    place = check_device(device, here=True)
    _check_memory(flow_class, config, place)
    torch.manual_seed(seed)
    model = flow_class(config)

    console = Console(stderr=True)
    columns = (TextColumn("training"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"))
    with (
        _sigterm_interrupts(),
        Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar,
    ):
        task = bar.add_task("training", total=steps, figures="")

        def on_start(done: int) -> None:
            bar.update(task, completed=done)
            _check_sheets(out, range(done + 1, steps + 1), sample_every)

        def on_step(step: StepReport) -> None:
            figures = f"loss {step.loss:+.4f}  {step.bits_per_dim:.3f} bits/dim"
            bar.update(task, completed=step.step, figures=figures)
            if not console.is_terminal and step.step % 50 == 0:
                print(f"step {step.step}/{steps}  {figures}  {step.seconds:.0f} s", file=sys.stderr)

        def on_sample(average: ImageFlow, step: int) -> None:
            labels = options.parse_labels("balanced", 20, average, seed)
            drawn = sampling.sample(average, num=20, labels=labels, seed=seed, strategy="sequential", progress=False)
            save_png(image_grid(drawn.images, columns=10), out / _SHEET.format(step))

        fit(model.to(place), data, settings, out, on_step, on_sample, on_start)
    figures = {"model": str(out), "flow": flow, "images": len(data), **asdict(config), "training": asdict(settings)}
    metrics = read_metrics(out)  # empty where no step was left to do and the file was deleted
    options.report(json, figures | {"last_step": metrics[-1] if metrics else None, **machine(place)})
    print(f"wrote the model folder {out}")


def _flow_class(name: str) -> type[ImageFlow]:
    """The flow that is registered under `--flow`. **Raises** `ValueError` where there is none."""
    found = find_flow(name)
    if found is None:
        raise InputValueError(f"--flow {name}: give one of {', '.join(flow_names())}")
    return found


def _check_memory(flow_class: type[ImageFlow], config: Any, place: torch.device) -> None:
    """**Raises** `ValueError` where training a flow of this `config` takes more memory than there is."""
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in flow_class(config).parameters())
    copies = 5 if place.type == "cpu" else 1  # weights, gradients, their average, and two moments of AdamW
    lacking = shortage(4 * copies * parameters)
    if lacking:
        raise InputValueError(
            f"a flow of {parameters:,} parameters needs {lacking}; give a smaller --channels, or fewer --blocks"
        )


def _check_sheets(out: Path, steps: range, every: int) -> None:
    """**Raises** `ValueError` where a sheet of samples would replace a picture that is not one of ours."""
    for path in sorted(out.glob("samples-*.png")):
        number = re.fullmatch(r"samples-(\d{6,10})\.png", path.name)
        if number and int(number[1]) in steps and int(number[1]) % every == 0:
            check_picture(path)


def _parameters(flow_class: type[ImageFlow]) -> Mapping[str, object]:
    """The options that the flow has, by the signature of its `config_from_options`."""
    return inspect.signature(flow_class.config_from_options).parameters


def _choices(flow_class: type[ImageFlow], noise: str, **given: Any) -> dict[str, Any]:
    """The options that are not `None`, of those that not every flow has, as arguments of `config_from_options`.

    **Raises** `ValueError` for those that this flow has not. One without `noise_std` takes uniform noise only.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    has_std = "noise_std" in _parameters(flow_class)
    others = {name: value for name, value in chosen.items() if name not in _parameters(flow_class)}
    if noise != "uniform" and not has_std:
        others["noise"] = noise
    if others:
        words = [f"--{name.replace('_', '-')}{'' if value is True else f' {value}'}" for name, value in others.items()]
        raise InputValueError(f"{', '.join(words)}: not an option of --flow {flow_class.model_type}; leave it out")
    if has_std and noise != "gaussian":
        chosen["noise_std"] = 0.0
    return chosen


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """A scheduler's SIGTERM ends training as Ctrl-C does: with a checkpoint."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
