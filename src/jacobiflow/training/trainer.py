"""Maximum-likelihood training of a flow, by one process or more, with checkpoints to resume from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacobiflow.blocks.guidance import SamplingSettings
from jacobiflow.data.dataset import ImageDataset
from jacobiflow.data.noise import Noise
from jacobiflow.errors import InputValueError
from jacobiflow.models.checkpoints.folder import check_own_model, write_model
from jacobiflow.models.flow import Flow, check_flow
from jacobiflow.training import folder
from jacobiflow.training.checkpoint import last_step, read_checkpoint, write_checkpoint
from jacobiflow.training.config import MAY_CHANGE, TrainingConfig
from jacobiflow.training.folder import TrainMetrics
from jacobiflow.training.loading import Key, NoisyItems, keys_of_process, keys_of_step, load_batches
from jacobiflow.training.processes import barrier, rank, world_size
from jacobiflow.training.signals import stop_signals
from jacobiflow.training.state import TrainState, sum_over_processes, to_flow
from jacobiflow.utils import files, serialization
from jacobiflow.utils.checks import check_kind
from jacobiflow.utils.progress import Progress
from jacobiflow.utils.timing import describe_machine

_PRIOR_MOMENTUM = 0.1  # Weight of the newest batch in the moving average of z^2.
_NUM_CHECKED = 16  # At least so many items have a checksum, which tells data sets and transforms apart.


def train(
    flow: Flow,
    data: Any,
    config: TrainingConfig,
    out: str | Path,
    *,
    held_out: Any = None,
    transform: Callable[[Any], Tensor] | None = None,
    on_step: Callable[[TrainMetrics], None] | None = None,
    on_sample: Callable[[Flow, int], None] | None = None,
    progress: Progress | None = None,
) -> Flow:
    """Trains a flow by maximum likelihood.

    The loss is mean(z^2) / 2 - log-det / D. Images have Gaussian noise of the standard deviation `noise_std` of the
    flow's config, or are uniformly dequantised if it is 0; tokens have Gaussian noise or none. A flow without scales
    also learns its prior variance, as a moving average of z^2. The first batch initialises the flow, see
    `Flow.initialize`.

    If `torch.distributed` is initialized, its processes share each batch; all of them call this function. The data of a
    step, their noise and dropped labels depend on the seed and the step only, so the weights are those of one process,
    to rounding.

    Each checkpoint also writes the averaged flow as a model folder, which can be sampled during the run. If the data
    have Gaussian noise, it recommends a denoising step at rate 1. It has the names of the classes of an `ImageDataset`.

    A second call with the same `out` resumes from the checkpoint, by one process or more. By as many as before it ends
    with the weights of a run without a stop, bit for bit. SIGINT, SIGTERM and SIGUSR1 end the step, write a checkpoint
    and raise KeyboardInterrupt. A second signal does not wait for the step.

    Args:
        flow: The flow, which is trained in place.
        data: A PyTorch dataset of known length. An item is data alone, or a pair of data and context: a label, or the
            numbers or states that the flow takes. Data are 8-bit images, which are scaled to [-1, 1], or floats of the
            shape that the flow takes.
        config: The settings of the run. A batch has at most as many samples as the data.
        out: The folder of the run, which is new or empty at first. It is on a disk that all processes see.
        held_out: A dataset whose loss under the averaged flow is measured at each checkpoint.
        transform: Changes the data of an item at random, before noise is added, such as a torchvision transform. It
            draws from PyTorch's global generator only, so that a resumed run can tell that it is the same.
        on_step: Called with the metrics of every step in the first process.
        on_sample: Called with the averaged flow and the step in the first process, every `sample_every` steps
            and after the last one.
        progress: Called after every step in the first process.

    Returns:
        The flow with averaged weights. If it is sharded, it is read from `out`.

    Raises:
        ValueError: If the data do not fit the flow, if another run uses `out`, if `out` holds other files, or if the
            loss is not finite. The last checkpoint stays.

    Example:
        >>> import tempfile
        >>> from jacobiflow.data import digits
        >>> flow = jf.MAF(jf.MAFConfig(1, 8, hidden_features=16, num_blocks=2))
        >>> with tempfile.TemporaryDirectory() as out:
        ...     train(flow, digits(), TrainingConfig(steps=2), out).config == jf.load(out).config
        True
    """
    check_kind("config", config, TrainingConfig, "a TrainingConfig")
    config = replace(config, batch_size=min(config.batch_size, max(len(data), 1)))
    _check(flow, config, data, held_out)
    out = Path(out)
    noise = Noise(flow.config.noise_std) if flow.image_shape is not None or flow.config.noise_std else None
    items = NoisyItems(data, transform, noise, config.label_dropout)
    held_out = None if held_out is None else NoisyItems(held_out, noise=noise)
    with ExitStack() as stack:
        if rank() == 0:
            stack.enter_context(files.locked(out))
            check_own_model(out)
            folder.write_or_check_manifest(out, _describe_run(flow, config, items), describe_machine(flow.var.device))
        barrier()
        if not (out / files.MANIFEST).exists():
            raise InputValueError(f"{out}: process {rank()} does not see it; give a folder on a shared disk")
        stop = stack.enter_context(stop_signals())
        run = _Run(flow, items, held_out, config, out)
        write_to_board = stack.enter_context(folder.open_board(out, run.step))
        is_saved = False
        while run.step < config.steps and not run.is_stopped:
            metrics = run.take_step(stop.is_set())
            write_to_board(metrics)
            if rank() == 0 and on_step is not None:
                on_step(metrics)
            if rank() == 0 and progress is not None:
                progress(run.step, config.steps, "training")
            is_saved = run.step % config.checkpoint_every == 0 or run.step == config.steps
            if is_saved:  # before samples are drawn, which may fail
                run.save()
            if on_sample is not None and (run.step % config.sample_every == 0 or run.step == config.steps):
                average = run.state.averaged_flow()
                if average is not None:
                    on_sample(average, run.step)
        if not is_saved:  # A run that was complete may have lost its model folder.
            run.save()
        if run.step < config.steps:
            raise KeyboardInterrupt
    return type(flow).from_pretrained(out) if run.state.is_sharded else run.state.average.flow


def _check(flow: Flow, config: TrainingConfig, data: Any, held_out: Any) -> None:
    """Raises InputError if flow, settings and data do not fit each other."""
    check_flow(flow)
    if not len(data):
        raise InputValueError("data: has no samples; give at least one")
    parts = world_size() * config.accumulation
    if config.batch_size < parts:
        raise InputValueError(
            f"less than a sample for each of {world_size()} processes and {config.accumulation} parts; give at "
            f"least {parts}",
            argument="batch_size",
            value=config.batch_size,
        )
    for name, dataset in (("data", data), ("held_out", held_out)):
        if dataset is not None:
            first = NoisyItems(dataset).__getitems__([(0, 0)])
            flow.check_data(first.x, name)
            flow.context_kind.resolve(to_flow(first, flow)[1], 1)
        if isinstance(dataset, ImageDataset) and dataset.labels is not None and flow.config.num_classes:
            flow.context_kind.resolve(dataset.labels, len(dataset))


def _describe_run(flow: Flow, config: TrainingConfig, items: NoisyItems) -> dict[str, Any]:
    """Returns the flow, settings and data that must not differ on resume, as a JSON object."""
    num = len(items.data)
    keys = [(i, i) for i in range(0, num, max(num // _NUM_CHECKED, 1))]
    batch = replace(items, noise=None).__getitems__(keys)
    tensors = [tensor.view(torch.uint8) for tensor in (batch.x, batch.context) if tensor is not None]
    checksum = files.sha256(*(tensor.numpy().tobytes() for tensor in tensors))
    settings = {name: value for name, value in asdict(config).items() if name not in MAY_CHANGE}
    return {
        "flow": flow.model_type, **serialization.encode(flow.config), **settings, "number_of_samples": num,
        "classes": list(_class_names(flow, items.data)), "data_or_transform_sha256": checksum,
    }  # fmt: skip


def _class_names(flow: Flow, data: Any) -> tuple[str, ...]:
    """Returns the names of the flow's classes; empty without names."""
    names = data.classes if isinstance(data, ImageDataset) else ()
    return names if len(names) == flow.config.num_classes else ()


class _Run:
    """A training run at a step.

    Attributes:
        step: Number of steps that are done.
        is_stopped: Whether a process has received a signal.
    """

    def __init__(
        self, flow: Flow, items: NoisyItems, held_out: NoisyItems | None, config: TrainingConfig, out: Path
    ) -> None:
        self.items, self.held_out, self.config, self.out = items, held_out, config, out
        self.step, self.is_stopped, self._unsaved = last_step(out), False, list[TrainMetrics]()
        num = len(items.data)
        if not self.step and type(flow).initialize is not Flow.initialize:
            flow.initialize(*to_flow(items.__getitems__(keys_of_step(num, 0, config)), flow))
        self.state = TrainState(flow, config)
        if self.step:
            read_checkpoint(out, self.state.tensors())
        if rank() == 0:
            folder.remove_later(out, self.step)
        average = self.state.average.flow
        if flow.config.noise_std:
            average.recommended = SamplingSettings(denoise=1.0)
        average.classes = _class_names(flow, items.data)
        keys = keys_of_process(num, range(self.step, config.steps), config)
        self._batches = load_batches(items, keys, config.workers)

    def take_step(self, is_stopping: bool) -> TrainMetrics:
        """Takes a step of the optimizer; with `is_stopping` in any process it is the last one of all."""
        started, config, state, flow = time.perf_counter(), self.config, self.state, self.state.flow
        loss, squares = torch.zeros((), device=flow.var.device), torch.zeros_like(flow.var)
        for part in range(config.accumulation):
            part_loss, part_squares = state.backward(next(self._batches), part == config.accumulation - 1)
            loss, squares = loss + part_loss, squares + part_squares
        sums = torch.cat((loss.view(1), loss.new_full((1,), is_stopping), squares.flatten()))
        means = sum_over_processes(sums) / config.batch_size
        if flow.learns_prior:
            flow.var.lerp_(means[2:].view_as(flow.var), _PRIOR_MOMENTUM)
        rate = config.rate(self.step)
        grad_norm = state.update(rate)
        nats, self.is_stopped = float(means[0]), bool(means[1])
        self.step += 1
        if not math.isfinite(nats) or not math.isfinite(grad_norm):
            raise InputValueError(
                f"step {self.step}: loss {nats}, gradient norm {grad_norm}; start again in another folder, with a "
                "smaller learning rate"
            )
        state.seconds += time.perf_counter() - started
        bits = None
        if flow.image_shape is not None:
            bits = (nats + 0.5 * math.log(2 * math.pi)) / math.log(2) + 7  # The width of one of 256 levels is 2^-7.
        is_due = self.step % config.checkpoint_every == 0 or self.step == config.steps
        held_out = self._held_out_loss(self.held_out) if is_due and self.held_out is not None else None
        self._unsaved.append(TrainMetrics(self.step, nats, bits, grad_norm, rate, float(state.seconds), held_out))
        return self._unsaved[-1]

    @torch.no_grad()
    def _held_out_loss(self, items: NoisyItems) -> float:
        """Returns the mean loss of the averaged flow on held-out data, whose noise is always the same."""
        num, count = len(items.data), world_size()
        # Every process runs as many batches, which sharded layers need; the losses of items from `num` on are left out.
        indices = range(rank(), -(-num // count) * count, count)
        size = -(-self.config.batch_size // count)
        keys: list[Key] = [(i % num, i % num) for i in indices]
        parts = [keys[first : first + size] for first in range(0, len(keys), size)]
        batches = load_batches(items, parts, self.config.workers)
        losses = torch.cat([self.state.average(*to_flow(batch, self.state.flow))[0] for batch in batches])
        return float(sum_over_processes(losses[: len(range(rank(), num, count))].sum()) / num)

    def save(self) -> None:
        """Writes the metrics, the model folder and the checkpoint of this step."""
        average = self.state.averaged_flow()
        if average is not None:
            folder.append_metrics(self.out, self._unsaved)
            write_model(average, self.out)
        self._unsaved.clear()
        write_checkpoint(self.out, self.step, self.state.tensors())
        barrier()  # All processes see the files.
