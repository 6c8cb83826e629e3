"""`jacobiflow train`: fit a flow to images."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

import jacobiflow as jf
from jacobiflow.cli import loading, options
from jacobiflow.cli.output import format_count, format_duration, progress_bar
from jacobiflow.errors import InputValueError
from jacobiflow.training.config import TrainingConfig
from jacobiflow.utils.provenance import Provenance

if TYPE_CHECKING:
    from jacobiflow.data import ImageDataset, Split
    from jacobiflow.models.config import FlowConfig
    from jacobiflow.models.flow import Flow
    from jacobiflow.training import TrainMetrics

_PRINT_EVERY = 50  # Steps between lines of metrics.
_NUM_HELD_OUT = 512
_MAX_NAMES = 12  # Names of classes that the summary lists.
_MAX_NATURAL_SIZE = 256  # Larger images are trained on only if --image-size is given: they take very long.


@dataclass(frozen=True, kw_only=True)
class TrainConfig(options.Config):
    """Train a TarFlow or a MAF.

    Rerun the same command to resume a stopped run. Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint and end the run.
    Several processes, started by torchrun or srun, share the work.

    Example: jacobiflow train --images fashion-mnist --out runs/fashion --steps 6000

    Attributes:
        out: Folder of the model, its checkpoint, metrics and samples.
        flow: tarflow, or maf: a masked autoregressive flow.
        patch_size: tarflow: side of a patch in pixels; default 2.
        width: Width of the transformers; maf: of the hidden layers.
        num_blocks: Number of flow blocks.
        layers_per_block: Transformer layers in a block; maf: hidden layers.
        head_dim: tarflow: width of an attention head; default 64.
        volume_preserving: tarflow: only shift values, and do not scale them.
        noise_std: tarflow: standard deviation of the images' Gaussian noise; 0 for uniform noise; default 0.1.
        image_size: Side in pixels to which images of a folder are scaled down. Default: the smallest side, if at most
            256.
        in_channels: 3 for colour, 1 for grey. Default: grey if all images are.
        unconditional: Do not use the images' labels.
        held_out: Images whose loss is measured at checkpoints, at most 512. Default: the test split of --images, if
            any.
        horizontal_flip: Mirror half of the images.
        translate: Largest translation of an image in pixels.
        hue: Largest change of the hue in degrees.
    """

    images: options.Images
    flow: Annotated[str, options.MODEL, options.near_miss("tarflow", "maf")] = "tarflow"
    patch_size: Annotated[int | None, options.MODEL] = None
    width: Annotated[int, options.MODEL] = 128
    num_blocks: Annotated[int, options.MODEL, Parameter(name="--blocks")] = 8
    layers_per_block: Annotated[int, options.MODEL, Parameter(name="--layers")] = 2
    head_dim: Annotated[int | None, options.MODEL] = None
    volume_preserving: Annotated[bool | None, options.MODEL] = None
    noise_std: Annotated[float | None, options.MODEL] = None
    image_size: Annotated[int | None, options.DATA] = None
    in_channels: Annotated[Literal[1, 3] | None, options.DATA, Parameter(name="--image-channels")] = None
    unconditional: Annotated[options.Flag, options.DATA] = False
    held_out: Annotated[str | None, options.IMAGES] = None
    horizontal_flip: Annotated[options.Flag, options.DATA] = False
    translate: Annotated[int, options.DATA] = 0
    hue: Annotated[float, options.DATA] = 0.0
    training: Annotated[TrainingConfig, options.TRAINING, options.NEGATABLE, Parameter(name="*")]
    device: options.Device = "auto"
    out: Annotated[Path, options.OUTPUT]
    folder_kind = "training"


@dataclass(frozen=True)
class TrainResult(Provenance):
    """A trained model.

    Attributes:
        config: The config of the flow.
        last_step: Metrics of the last step; None if their file was deleted.
    """

    config: FlowConfig
    last_step: TrainMetrics | None


def run(config: TrainConfig) -> TrainResult | None:
    """Trains the flow, or resumes its training."""
    import torch

    from jacobiflow import plots, training
    from jacobiflow.models.contexts import class_names
    from jacobiflow.training.checkpoint import last_step
    from jacobiflow.training.processes import process_group
    from jacobiflow.utils import timing
    from jacobiflow.utils.checks import check_device
    from jacobiflow.utils.launch import find_launch, local_device

    data = _training_images(config)
    held_out = _held_out_images(config, data)
    torch.manual_seed(config.training.seed)
    flow = _make_flow(config, data)
    device = local_device(config.device)
    flow.to(check_device(device))
    transform = training.image_transform(flow.require_images(), config.horizontal_flip, config.translate, config.hue)

    start = last_step(config.out)
    is_first, num_steps = find_launch().rank == 0, config.training.steps
    if is_first:
        loading.warn_of_gpu(device, "compare the losses of a few steps with those on the CPU first")
        print(_summary(config, data, held_out, flow), file=sys.stderr)
        if start:
            rest = f" of {num_steps:,}" if start < num_steps else "; the run is complete; to go on, give more --steps"
            print(f"found the checkpoint of step {start:,}{rest}", file=sys.stderr)

    def print_metrics(metrics: TrainMetrics) -> None:
        if metrics.step % _PRINT_EVERY == 0 or metrics.held_out_loss is not None:
            held_out = "" if metrics.held_out_loss is None else f"  held out {metrics.held_out_loss:+.4f}"
            values = f"loss {metrics.loss:+.4f}{held_out}  {metrics.bits_per_dim:.3f} bits/dim"
            remaining = metrics.seconds / metrics.step * (num_steps - metrics.step)
            times = f"{format_duration(metrics.seconds)}, about {format_duration(remaining)} left"
            print(f"step {metrics.step:,} of {num_steps:,}  {values}  {times}", file=sys.stderr)

    def save_samples(average: Flow, step: int) -> None:
        labels = options.parse_labels(("balanced",), 20, average, config.training.seed)
        samples = jf.sample(average, num=20, labels=labels, seed=config.training.seed, strategy="sequential")
        sheet = samples.grid(10, class_names(labels, average.classes))
        plots.save_png(sheet, config.out / f"samples-{step:06d}.png")

    with process_group(), progress_bar() as progress:
        training.train(
            flow, data, config.training, config.out, held_out=held_out, transform=transform,
            on_step=print_metrics, on_sample=save_samples, progress=progress,
        )  # fmt: skip
    if not is_first:
        return None
    metrics = training.read_metrics(config.out)
    # The user may have deleted the metrics of a run that is complete.
    machine = timing.describe_machine(flow.var.device)
    return TrainResult(flow.config, metrics[-1] if metrics else None, machine=machine)


def show(config: TrainConfig, result: TrainResult) -> None:
    """Prints the last step."""
    if result.last_step is not None:
        last = result.last_step
        print(f"{format_count(last.step, 'step')}: loss {last.loss:+.4f}, {last.bits_per_dim:.3f} bits per dimension")
    print(f"the model folder is {config.out}")


def _training_images(config: TrainConfig) -> ImageDataset:
    """Loads the images of `--images`, by default at their own size and in their own colour."""
    from jacobiflow.data import ImageFiles, load_images
    from jacobiflow.data.image_files import read_image

    size, data = config.image_size, load_images(config.images, None, config.in_channels)
    natural = data.images.shape[-1]
    if size is None and natural > _MAX_NATURAL_SIZE and isinstance(data.images, ImageFiles):
        raise InputValueError(
            f"{config.images}: the smallest images have {natural} pixels on a side, and training on images of "
            "that size is slow; give a smaller --image-size, such as 32, to scale them down"
        )
    if size is not None and size > natural:
        for file in data.images.files if isinstance(data.images, ImageFiles) else ():
            read_image(file, size, channels=3)  # Its error names the first that is too small.
        raise InputValueError(
            f"--image-size {size}: the images have {natural} pixels on a side; give --image-size {natural} or less"
        )
    return data if size in (None, natural) else load_images(config.images, size, data.images.shape[1])


def _held_out_images(config: TrainConfig, data: ImageDataset) -> ImageDataset | None:
    """Loads images of `--held-out`, or of the test split, in the size and colour of the training images."""
    from jacobiflow.data import available_splits, load_images

    source = config.held_out or config.images
    split: Split = "test" if "test" in available_splits(source) else "train"
    if config.held_out is None and split == "train":
        return None
    channels, size, _ = data.images.shape[1:]
    held_out = load_images(source, size, channels, split)
    if held_out.classes and data.classes and held_out.classes != data.classes and not config.unconditional:
        raise InputValueError(
            f"--held-out {config.held_out}: its classes are {', '.join(held_out.classes)}, and those of "
            f"{config.images} are {', '.join(data.classes)}; give a folder with the same subfolders"
        )
    return held_out.evenly_spaced(min(_NUM_HELD_OUT, len(held_out)))  # A folder's images are sorted by class.


def _summary(config: TrainConfig, data: ImageDataset, held_out: ImageDataset | None, flow: Flow) -> str:
    """Describes the data, the flow and the run."""
    from jacobiflow.data import ImageFiles
    from jacobiflow.utils.launch import count_slurm_tasks, find_launch

    channels, height, width = data.images.shape[1:]
    scaled = "; other sizes are scaled down, and cropped to the centre" * isinstance(data.images, ImageFiles)
    num_classes = flow.config.num_classes
    names = ", ".join(data.classes[:_MAX_NAMES]) + ", ..." * (num_classes > _MAX_NAMES)
    parameters = sum(parameter.numel() for parameter in flow.parameters())
    steps, batch_size = format_count(config.training.steps, "step"), min(config.training.batch_size, len(data))
    fewer = f" (all that there are; --batch-size is {config.training.batch_size:,})"
    processes, tasks = find_launch().count, count_slurm_tasks()
    return (
        f"images: {len(data):,} of {width}x{height} pixels, {'grey' if channels == 1 else 'colour'}{scaled}\n"
        f"classes: {num_classes or 'none'}{f' ({names})' * (len(data.classes) == num_classes > 0)}\n"
        f"held out: {'none' if held_out is None else f'{len(held_out):,} images'}\n"
        f"model: {config.flow}, {parameters:,} parameters\n"
        f"training: {steps} of {format_count(batch_size, 'image')}{fewer * (batch_size < config.training.batch_size)}"
        f", on {flow.var.device.type}"
        f"{f' in {processes} processes' * (processes > 1)}"
        f"{f'; srun would start all {tasks} tasks of this SLURM job' * (processes == 1 < tasks)}"
    )


def _make_flow(config: TrainConfig, data: ImageDataset) -> Flow:
    """Makes the flow; raises InputValueError for an option that it does not have."""
    from jacobiflow.models.flow import Flow
    from jacobiflow.models.registry import FLOWS

    methods = {name: inspect.getattr_static(kind, "config_from_options") for name, kind in FLOWS.items()}
    trainable = [name for name, method in methods.items() if method is not vars(Flow)["config_from_options"]]
    if config.flow not in trainable:
        raise InputValueError(f"--flow {config.flow}: give one of {', '.join(sorted(trainable))}")
    flow_class = FLOWS[config.flow]
    names = ("patch_size", "head_dim", "noise_std", "volume_preserving")
    extra = {name: value for name in names if (value := getattr(config, name)) is not None}
    for name, value in extra.items():
        if name not in inspect.signature(flow_class.config_from_options).parameters:
            raise InputValueError(f"not an option of --flow {config.flow}; leave it out", argument=name, value=value)
    channels, size, _ = data.images.shape[1:]
    num_classes = 0 if config.unconditional or data.labels is None else int(data.labels.max()) + 1
    flow_config = flow_class.config_from_options(
        in_channels=channels, image_size=size, width=config.width, blocks=config.num_blocks,
        layers=config.layers_per_block, num_classes=num_classes, **extra,
    )  # fmt: skip
    return flow_class(flow_config)


def describe_kept(config: TrainConfig) -> str:
    """Describes the checkpoint that Ctrl-C leaves, and how to go on."""
    from jacobiflow.training.checkpoint import last_step

    step = last_step(config.out)
    if not step:
        return "before the first checkpoint; run the same command to start again"
    return f"checkpoint at step {step:,} of {config.training.steps:,} in {config.out}; run the same command to resume"
