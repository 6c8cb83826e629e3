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
from jacobiflow.cli import loading, options
from jacobiflow.cli.output import progress_bar
from jacobiflow.errors import InputValueError

if TYPE_CHECKING:
    from jacobiflow.models.flow import Flow
    from jacobiflow.training import TrainMetrics

_PRINT_EVERY = 50  # Steps between lines of metrics.
_NOISE = "tarflow: standard deviation of the images' Gaussian noise; 0 for uniform noise; default 0.1."


def train(
    images: options.Images,
    out: Annotated[Path, Option(help="Folder of the model, its checkpoint, metrics and samples.")],
    steps: Annotated[int, Option(help="Optimizer steps in all, those of earlier runs included.")],
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
    horizontal_flip: Annotated[bool, Option("--horizontal-flip", help="Mirror half of the images.")] = False,
    translate: Annotated[int, Option(help="Largest translation of an image in pixels.")] = 0,
    hue: Annotated[float, Option(help="Largest rotation of the colours in degrees.")] = 0.0,
    batch_size: Annotated[int, Option(help="Images in a step.")] = 64,
    learning_rate: Annotated[float, Option(help="Peak learning rate of AdamW.")] = 1e-3,
    warmup: Annotated[int, Option(help="Steps of linear warm-up.")] = 200,
    ema_decay: Annotated[float, Option(help="Decay of the averaged weights.")] = 0.999,
    max_grad_norm: Annotated[float, Option(help="Gradients with a larger norm are clipped.")] = 1.0,
    label_dropout: Annotated[float, Option(help="Probability of dropping a label, for guidance.")] = 0.1,
    bf16: Annotated[bool, Option(help="Autocast to bfloat16.")] = True,
    checkpoint_every: Annotated[int, Option(help="Steps between checkpoints.")] = 100,
    sample_every: Annotated[int, Option(help="Steps between sheets of samples.")] = 500,
    seed: options.Seed = 0,
    device: options.Device = "auto",
) -> dict[str, Any]:
    """Train a TarFlow or a MAF.

    The same command again resumes a run that was stopped.

    Example: jacobiflow train --images fashion-mnist --out runs/fashion --steps 6000
    """
    import torch

    from jacobiflow import plots, training
    from jacobiflow.data import Augmentation, load_images
    from jacobiflow.models.registry import FLOWS
    from jacobiflow.utils import timing
    from jacobiflow.utils.checks import check_device

    if flow not in _trainable_flows():
        raise InputValueError(f"--flow {flow}: give one of {', '.join(_trainable_flows())}")
    flow_class = FLOWS[flow]
    data = load_images(images, image_size, image_channels)
    extra_options = _check_options(
        flow_class, patch_size=patch_size, head_dim=head_dim, volume_preserving=volume_preserving or None,
        noise_std=noise_std,
    )  # fmt: skip
    config = flow_class.config_from_options(
        in_channels=image_channels, image_size=image_size, channels=channels, blocks=blocks, layers=layers,
        num_classes=0 if unconditional or data.labels is None else int(data.labels.max()) + 1, **extra_options,
    )  # fmt: skip
    torch_device = check_device(loading.pick_device(device), must_exist=True)
    torch.manual_seed(seed)
    model = flow_class(config)
    settings = training.TrainConfig(
        steps=steps, noise=loading.training_noise(model), augmentation=Augmentation(horizontal_flip, translate, hue),
        batch_size=batch_size, learning_rate=learning_rate, warmup=warmup, ema_decay=ema_decay,
        max_grad_norm=max_grad_norm, label_dropout=label_dropout, bf16=bf16, seed=seed,
        checkpoint_every=checkpoint_every, sample_every=sample_every,
    )  # fmt: skip

    def print_metrics(metrics: TrainMetrics) -> None:
        if metrics.step % _PRINT_EVERY == 0:
            values = f"loss {metrics.loss:+.4f}  {metrics.bits_per_dim:.3f} bits/dim  {metrics.seconds:.0f} s"
            print(f"step {metrics.step}/{steps}  {values}", file=sys.stderr)

    def save_samples(average: Flow, step: int) -> None:
        labels = options.parse_labels("balanced", 20, average, seed)
        samples = jf.sample(average, num=20, labels=labels, seed=seed, strategy="sequential")
        plots.save_png(samples.grid(10), out / f"samples-{step:06d}.png")

    # SIGTERM saves a checkpoint, like Ctrl-C.
    earlier_handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with progress_bar() as progress:
            training.train(model.to(torch_device), data, settings, out, print_metrics, save_samples, progress)
    finally:
        signal.signal(signal.SIGTERM, earlier_handler or signal.SIG_DFL)
    metrics = training.read_metrics(out)
    if metrics:  # The user may have deleted the file of a run that is complete.
        last = metrics[-1]
        print(f"{last.step:,} steps: loss {last.loss:+.4f}, {last.bits_per_dim:.3f} bits per dimension")
    print(f"wrote the model folder {out}")
    last_step = asdict(metrics[-1]) if metrics else None
    machine = timing.describe_machine(torch_device)
    return {"model": str(out), "flow": flow, **asdict(config), "last_step": last_step, **machine}


def _trainable_flows() -> list[str]:
    """Returns the names of the flows that make a config from the options of `train`."""
    from jacobiflow.models.flow import Flow
    from jacobiflow.models.registry import FLOWS

    base_method = inspect.getattr_static(Flow, "config_from_options")
    return sorted(
        name for name, kind in FLOWS.items() if inspect.getattr_static(kind, "config_from_options") is not base_method
    )


def _check_options(flow_class: type[Flow], **values: Any) -> dict[str, Any]:
    """Returns the options that are not None; raises ValueError for one that this kind of flow does not have."""
    flow_options = {name: value for name, value in values.items() if value is not None}
    parameters = inspect.signature(flow_class.config_from_options).parameters
    for name, value in flow_options.items():
        if name not in parameters:
            option = f"--{name.replace('_', '-')} {value}"
            raise InputValueError(f"{option}: not an option of --flow {flow_class.model_type}; leave it out")
    return flow_options
