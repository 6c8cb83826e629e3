"""`jacobiflow train`: fit a flow to images."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

import jacobiflow as jf
from jacobiflow.cli import loading, options
from jacobiflow.cli.job import as_command
from jacobiflow.cli.output import progress_bar
from jacobiflow.errors import InputValueError
from jacobiflow.training.config import TrainConfig
from jacobiflow.utils.provenance import Provenance

if TYPE_CHECKING:
    from jacobiflow.data import ImageDataset
    from jacobiflow.distributed import Processes
    from jacobiflow.models.config import FlowConfig
    from jacobiflow.models.flow import Flow
    from jacobiflow.training import TrainMetrics

_PRINT_EVERY = 50  # Steps between lines of metrics.
_NOISE = "tarflow: standard deviation of the images' Gaussian noise; 0 for uniform noise; default 0.1."
_HELD_OUT = "Images whose loss is measured at checkpoints, at most 512. Default: the test split of --images, if any."
_NUM_HELD_OUT = 512


@dataclass(frozen=True)
class TrainOptions:
    """The options of `jacobiflow train`."""

    images: options.Images
    out: Annotated[Path, Option(help="Folder of the model, its checkpoint, metrics and samples.")]
    training: TrainConfig
    flow: Annotated[str, Option(help="tarflow, or maf: a masked autoregressive flow.")] = "tarflow"
    patch_size: Annotated[int | None, Option(help="tarflow: side of a patch in pixels; default 2.")] = None
    channels: Annotated[int, Option(help="Width of the transformers; maf: of the hidden layers.")] = 128
    blocks: Annotated[int, Option(help="Number of flow blocks.")] = 8
    layers: Annotated[int, Option(help="Transformer layers in a block; maf: hidden layers.")] = 2
    head_dim: Annotated[int | None, Option(help="tarflow: width of an attention head; default 64.")] = None
    volume_preserving: Annotated[bool, Option("--volume-preserving", help="tarflow: shifts only.")] = False
    noise_std: Annotated[float | None, Option(help=_NOISE)] = None
    image_size: Annotated[int, Option(help="Side of the images in pixels.")] = 28
    image_channels: Annotated[int, Option(help="1 for grey, 3 for colour.")] = 1
    unconditional: Annotated[bool, Option("--unconditional", help="Do not use the images' labels.")] = False
    held_out: Annotated[str | None, Option(help=_HELD_OUT)] = None
    horizontal_flip: Annotated[bool, Option("--horizontal-flip", help="Mirror half of the images.")] = False
    translate: Annotated[int, Option(help="Largest translation of an image in pixels.")] = 0
    hue: Annotated[float, Option(help="Largest change of the hue in degrees.")] = 0.0
    device: options.Device = "auto"


@dataclass(frozen=True)
class TrainResult(Provenance):
    """A trained model.

    Attributes:
        model: The model folder.
        flow: The kind of flow.
        last_step: Metrics of the last step; None if their file was deleted.
    """

    model: str
    flow: str
    config: FlowConfig
    last_step: TrainMetrics | None


def run(config: TrainOptions, processes: Processes) -> TrainResult:
    """Train a TarFlow or a MAF.

    The same command again resumes a run that was stopped. Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint and end the
    run. Several processes share the work, started by torchrun or srun.

    Example: jacobiflow train --images fashion-mnist --out runs/fashion --steps 6000
    """
    import torch

    from jacobiflow import plots, training
    from jacobiflow.data import load_images
    from jacobiflow.training.transforms import image_transform
    from jacobiflow.utils import timing
    from jacobiflow.utils.checks import check_device

    data = load_images(config.images, config.image_size, config.image_channels)
    flow_class, flow_config = _flow_config(config, data)
    device = check_device(processes.device(loading.pick_device(config.device)), must_exist=True)
    torch.manual_seed(config.training.seed)
    flow = flow_class(flow_config).to(device)
    transform = image_transform(flow.require_images(), config.horizontal_flip, config.translate, config.hue)

    def print_metrics(metrics: TrainMetrics) -> None:
        if metrics.step % _PRINT_EVERY == 0 or metrics.held_out_loss is not None:
            held_out = "" if metrics.held_out_loss is None else f"  held out {metrics.held_out_loss:+.4f}"
            values = f"loss {metrics.loss:+.4f}{held_out}  {metrics.bits_per_dim:.3f} bits/dim"
            print(f"step {metrics.step}/{config.training.steps}  {values}  {metrics.seconds:.0f} s", file=sys.stderr)

    def save_samples(average: Flow, step: int) -> None:
        labels = options.parse_labels("balanced", 20, average, config.training.seed)
        samples = jf.sample(average, num=20, labels=labels, seed=config.training.seed, strategy="sequential")
        plots.save_png(samples.grid(10), config.out / f"samples-{step:06d}.png")

    with progress_bar(is_shown=processes.rank == 0) as progress:
        training.train(
            flow, data, config.training, config.out, held_out=_held_out_images(config), transform=transform,
            on_step=print_metrics, on_sample=save_samples, progress=progress, processes=processes,
        )  # fmt: skip
    metrics = training.read_metrics(config.out)
    last_step = metrics[-1] if metrics else None  # The user may have deleted the file of a run that is complete.
    machine = timing.describe_machine(device)
    return TrainResult(str(config.out), config.flow, flow_config, last_step, machine=machine)


def show(result: TrainResult) -> None:
    """Prints the last step."""
    if result.last_step is not None:
        last = result.last_step
        print(f"{last.step:,} steps: loss {last.loss:+.4f}, {last.bits_per_dim:.3f} bits per dimension")
    print(f"wrote the model folder {result.model}")


def _held_out_images(config: TrainOptions) -> ImageDataset | None:
    """Loads the first images of `--held-out`, or of the test split."""
    from jacobiflow.data import ImageDataset, available_splits, load_images

    split = "test" if "test" in available_splits(config.held_out or config.images) else "train"
    if config.held_out is None and split == "train":
        return None
    data = load_images(config.held_out or config.images, config.image_size, config.image_channels, split)  # type: ignore[arg-type]
    labels = None if data.labels is None else data.labels[:_NUM_HELD_OUT]
    return ImageDataset(data.images[:_NUM_HELD_OUT], labels)


def _flow_config(config: TrainOptions, data: ImageDataset) -> tuple[type[Flow], FlowConfig]:
    """Returns the class of the flow and its config; raises ValueError for an option that this flow does not have."""
    from jacobiflow.models.registry import FLOWS

    if config.flow not in _trainable_flows():
        raise InputValueError(f"--flow {config.flow}: give one of {', '.join(_trainable_flows())}")
    flow_class = FLOWS[config.flow]
    extra: dict[str, Any] = {name: getattr(config, name) for name in ("patch_size", "head_dim", "noise_std")}
    extra["volume_preserving"] = config.volume_preserving or None
    extra = {name: value for name, value in extra.items() if value is not None}
    parameters = inspect.signature(flow_class.config_from_options).parameters
    for name, value in extra.items():
        if name not in parameters:
            option = f"--{name.replace('_', '-')} {value}"
            raise InputValueError(f"{option}: not an option of --flow {config.flow}; leave it out")
    num_classes = 0 if config.unconditional or data.labels is None else int(data.labels.max()) + 1
    return flow_class, flow_class.config_from_options(
        in_channels=config.image_channels, image_size=config.image_size, channels=config.channels,
        blocks=config.blocks, layers=config.layers, num_classes=num_classes, **extra,
    )  # fmt: skip


def _trainable_flows() -> list[str]:
    """Returns the names of the flows that make a config from the options of `train`."""
    from jacobiflow.models.flow import Flow
    from jacobiflow.models.registry import FLOWS

    base_method = inspect.getattr_static(Flow, "config_from_options")
    return sorted(
        name for name, kind in FLOWS.items() if inspect.getattr_static(kind, "config_from_options") is not base_method
    )


train = as_command(TrainOptions, run, show)
