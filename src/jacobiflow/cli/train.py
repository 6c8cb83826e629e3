"""`jacobiflow train`: fit a flow to images."""

from __future__ import annotations

import inspect
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

import jacobiflow as jf
from jacobiflow.cli import shared
from jacobiflow.errors import InputValueError

if TYPE_CHECKING:
    from jacobiflow.models.flow import Flow
    from jacobiflow.training import TrainMetrics

_REPORT_EVERY = 50  # steps
_NOISE = "tarflow: standard deviation of the images' Gaussian noise; 0 for uniform noise; default 0.1."


def train(
    images: shared.Images,
    out: Annotated[Path, Option(help="Folder of the model, its checkpoint, metrics and samples.")],
    steps: Annotated[int, Option(help="Optimiser steps in all, those of earlier runs included.")],
    flow: Annotated[str, Option(help="tarflow, or maf: a masked autoregressive flow.")] = "tarflow",
    patch_size: Annotated[int | None, Option(help="tarflow: side of a patch in pixels; default 2.")] = None,
    channels: Annotated[int, Option(help="Width of the transformers; maf: of the hidden layers.")] = 128,
    blocks: Annotated[int, Option(help="Number of flow blocks.")] = 8,
    layers: Annotated[int, Option(help="Transformer layers in a block; maf: hidden layers.")] = 2,
    head_dim: Annotated[int | None, Option(help="tarflow: width of an attention head; default 64.")] = None,
    volume_preserving: Annotated[bool, Option("--volume-preserving", help="tarflow: shifts only.")] = False,
    image_size: Annotated[int, Option(help="Side of the images in pixels.")] = 28,
    image_channels: Annotated[int, Option(help="1 for grey, 3 for colour.")] = 1,
    unconditional: Annotated[bool, Option("--unconditional", help="Do not use the images' labels.")] = False,
    noise_std: Annotated[float | None, Option(help=_NOISE)] = None,
    mirror: Annotated[bool, Option("--mirror", help="Mirror half of the images.")] = False,
    shift: Annotated[int, Option(help="Shift images by up to so many pixels.")] = 0,
    hue: Annotated[float, Option(help="Turn colours by an angle of up to so many degrees.")] = 0.0,
    batch_size: Annotated[int, Option(help="Images in a step.")] = 64,
    learning_rate: Annotated[float, Option(help="Peak rate of AdamW.")] = 1e-3,
    warmup: Annotated[int, Option(help="Steps of linear warm-up.")] = 200,
    ema: Annotated[float, Option(help="Decay of the averaged weights.")] = 0.999,
    clip: Annotated[float, Option(help="Largest gradient norm.")] = 1.0,
    drop_label: Annotated[float, Option(help="Share of labels dropped.")] = 0.1,
    bf16: Annotated[bool, Option(help="Autocast to bfloat16.")] = True,
    checkpoint_every: Annotated[int, Option(help="Steps between checkpoints.")] = 100,
    sample_every: Annotated[int, Option(help="Steps between sheets of samples.")] = 500,
    seed: shared.Seed = 0,
    device: shared.Device = "auto",
) -> dict[str, Any]:
    """Train a TarFlow or a MAF.

    The same command again resumes a run that was stopped.

    Example: jacobiflow train --images fashion-mnist --out runs/fashion --steps 6000
    """
    import torch

    from jacobiflow import plots, training
    from jacobiflow.data import Augmentation, load_images
    from jacobiflow.models.flow import Flow
    from jacobiflow.models.registry import FLOWS
    from jacobiflow.utils import timing
    from jacobiflow.utils.checks import check_device

    not_trainable = inspect.getattr_static(Flow, "config_from_options")
    trainable = [
        name for name, kind in FLOWS.items()
        if inspect.getattr_static(kind, "config_from_options") is not not_trainable
    ]  # fmt: skip
    if flow not in trainable:
        raise InputValueError(f"--flow {flow}: give one of {', '.join(sorted(trainable))}")
    data = load_images(images, image_size, image_channels)
    flow_class = FLOWS[flow]
    extra = _extra_options(
        flow_class, patch_size=patch_size, head_dim=head_dim, volume_preserving=volume_preserving or None,
        noise_std=noise_std,
    )  # fmt: skip
    config = flow_class.config_from_options(
        in_channels=image_channels, image_size=image_size, channels=channels, blocks=blocks, layers=layers,
        num_classes=0 if unconditional or data.labels is None else int(data.labels.max()) + 1, **extra,
    )  # fmt: skip
    place = check_device(shared.pick_device(device), here=True)
    torch.manual_seed(seed)
    model = flow_class(config)
    settings = training.TrainConfig(
        steps=steps, noise=shared.training_noise(model), augmentation=Augmentation(mirror, shift, hue),
        batch_size=batch_size, learning_rate=learning_rate, warmup=warmup, ema=ema, clip=clip, drop_label=drop_label,
        bf16=bf16, seed=seed, checkpoint_every=checkpoint_every, sample_every=sample_every,
    )  # fmt: skip

    def on_step(report: TrainMetrics) -> None:
        if report.step % _REPORT_EVERY == 0:
            metrics = f"loss {report.loss:+.4f}  {report.bits_per_dim:.3f} bits/dim  {report.seconds:.0f} s"
            print(f"step {report.step}/{steps}  {metrics}", file=sys.stderr)

    def on_sample(average: Flow, step: int) -> None:
        labels = shared.parse_labels("balanced", 20, average, seed)
        samples = jf.sample(average, num=20, labels=labels, seed=seed, strategy="sequential")
        plots.save_png(samples.grid(10), out / f"samples-{step:06d}.png")

    # SIGTERM saves a checkpoint, like Ctrl-C.
    earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with shared.progress_bar() as progress:
            training.train(model.to(place), data, settings, out, on_step, on_sample, progress)
    finally:
        signal.signal(signal.SIGTERM, earlier or signal.SIG_DFL)  # None is a handler that is not Python's
    metrics = training.read_metrics(out)  # empty if no step was left to do and the file was deleted
    last = asdict(metrics[-1]) if metrics else None
    if last is not None:
        print("{step:,} steps: loss {loss:+.4f}, {bits_per_dim:.3f} bits per dimension".format(**last))
    print(f"wrote the model folder {out}")
    return {"model": str(out), "flow": flow, **asdict(config), "last_step": last, **timing.machine(place)}


def _extra_options(flow_class: type[Flow], **values: Any) -> dict[str, Any]:
    """The values that were given, of options that only some flows have; ValueError if this flow lacks one."""
    extra = {name: value for name, value in values.items() if value is not None}
    parameters = inspect.signature(flow_class.config_from_options).parameters
    for name, value in extra.items():
        if name not in parameters:
            option = f"--{name.replace('_', '-')} {value}"
            raise InputValueError(f"{option}: not an option of --flow {flow_class.model_type}; leave it out")
    return extra
