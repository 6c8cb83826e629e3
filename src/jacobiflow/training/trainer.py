"""Maximum-likelihood training of a flow, by one process or more, with checkpoints to resume from."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from jacobiflow.blocks.guidance import SamplingSettings
from jacobiflow.data.dataset import ImageDataset
from jacobiflow.data.noise import Noise
from jacobiflow.errors import InputValueError
from jacobiflow.models.checkpoints.folder import check_own_model, write_model
from jacobiflow.models.flow import Flow, check_flow
from jacobiflow.training import folder
from jacobiflow.training.checkpoint import read_state
from jacobiflow.training.config import MAY_CHANGE, TrainConfig
from jacobiflow.training.folder import TrainMetrics
from jacobiflow.training.loading import (
    HELD_OUT,
    TRAINING,
    Batch,
    NoisyItems,
    keys_of_process,
    keys_of_step,
    load_batches,
)
from jacobiflow.training.parallel import ParallelFlow, to_flow
from jacobiflow.training.processes import barrier, rank, world_size
from jacobiflow.training.signals import StopSignals
from jacobiflow.utils.checks import check_kind
from jacobiflow.utils.files import locked
from jacobiflow.utils.progress import Progress

_PRIOR_MOMENTUM = 0.1  # Weight of the newest batch in the moving average of z^2.
_NUM_CHECKED = 16  # Items whose checksum tells data sets apart.


def train(
    flow: Flow,
    data: Any,
    config: TrainConfig,
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
        config: The settings of the run.
        out: The folder of the run, which is new or empty at first. It is on a disk that all processes see.
        held_out: A dataset whose loss under the averaged flow is measured at each checkpoint.
        transform: Changes the data of an item at random, before noise is added, such as a torchvision transform. It
            draws from PyTorch's global generator.
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
        ...     train(flow, digits(), TrainConfig(steps=2), out).config == jf.load(out).config
        True
    """
    noise = _check(flow, data, config)
    out = Path(out)
    items = NoisyItems(data, transform, noise, config.label_dropout, config.seed, TRAINING)
    held_out = None if held_out is None else NoisyItems(held_out, None, noise, 0.0, config.seed, HELD_OUT)
    run = _describe(flow, config, items)
    with ExitStack() as stack:
        if rank() == 0:
            stack.enter_context(locked(out))
            check_own_model(out)
            folder.start_or_resume(out, run)
        barrier()
        if not (out / folder.RUN).exists():
            raise InputValueError(f"{out}: process {rank()} does not see it; give a folder on a shared disk")
        stop = stack.enter_context(StopSignals())
        state = _Run(flow, items, held_out, config, out)
        board = None
        if rank() == 0 and state.step < config.steps:
            board = stack.enter_context(folder.open_board(out, state.step))
        for metrics in state.steps(stop):
            if board is not None:
                board(metrics)
            if rank() == 0 and on_step is not None:
                on_step(metrics)
            if rank() == 0 and progress is not None:
                progress(metrics.step, config.steps, "training")
            if on_sample is not None and (metrics.step % config.sample_every == 0 or metrics.step == config.steps):
                average = state.parallel.averaged_flow()
                if average is not None:
                    on_sample(average, metrics.step)
        state.save()
        if state.stopped and state.step < config.steps:
            raise KeyboardInterrupt
    return type(flow).from_pretrained(out) if state.parallel.is_sharded else state.parallel.average.flow


def _check(flow: Flow, data: Any, config: TrainConfig) -> Noise | None:
    """Raises ValueError if flow, data and settings do not fit each other; returns the noise of the data."""
    check_flow(flow)
    check_kind("config", config, TrainConfig, "a TrainConfig")
    std = flow.config.noise_std
    noise = None if flow.image_shape is None and not std else Noise(std)
    if len(data) < config.batch_size:
        message = f"there are only {len(data)} samples"
        raise InputValueError(message, argument="batch_size", value=config.batch_size)
    parts = world_size() * config.accumulation
    if config.batch_size < parts:
        raise InputValueError(
            f"less than a sample for each of {world_size()} processes and {config.accumulation} parts; give at "
            f"least {parts}",
            argument="batch_size",
            value=config.batch_size,
        )
    if isinstance(data, ImageDataset) and data.labels is not None and flow.config.num_classes:
        flow.check_labels(data.labels, len(data))
    flow.check_data(NoisyItems(data, None, None, 0.0, 0, 0).__getitems__([(0, 0)]).x, "data")
    return noise


def _describe(flow: Flow, config: TrainConfig, items: NoisyItems) -> dict[str, Any]:
    """Returns the flow, settings and data that must not differ on resume."""
    plain, num = replace(items, transform=None, noise=None, dropout=0.0), len(items.data)
    digest = hashlib.sha256()
    for index in range(0, num, max(num // _NUM_CHECKED, 1)):
        for tensor in plain.__getitems__([(0, index)]):
            if tensor is not None:
                digest.update(tensor.contiguous().numpy().data)
    settings = {name: value for name, value in asdict(config).items() if name not in MAY_CHANGE}
    transform = repr(items.transform) if isinstance(items.transform, nn.Module) else type(items.transform).__name__
    data = f"{num:,} samples with checksum {digest.hexdigest()[:16]}"
    names = {"transform": transform, "data": data, "classes": _class_names(flow, items.data)}
    return {"flow": flow.model_type, **asdict(flow.config), **settings, **names}


def _class_names(flow: Flow, data: Any) -> tuple[str, ...]:
    """Returns the names of the flow's classes; empty without names."""
    names = data.classes if isinstance(data, ImageDataset) else ()
    return names if len(names) == flow.config.num_classes else ()


class _Run:
    """The state of a training run.

    Attributes:
        step: Number of steps that are done.
        stopped: Whether a signal ended the run before its last step.
    """

    def __init__(
        self, flow: Flow, items: NoisyItems, held_out: NoisyItems | None, config: TrainConfig, out: Path
    ) -> None:
        self.items, self.held_out, self.config, self.out = items, held_out, config, out
        self.step, checkpoint = folder.last_checkpoint(out)
        self.seconds, self.stopped, self._saved_step = 0.0, False, -1
        self._unsaved_lines = list[str]()
        if checkpoint is None and type(flow).initialize is not Flow.initialize:
            keys = keys_of_step(len(items.data), 0, config)
            flow.initialize(*to_flow(items.__getitems__(keys), flow))
        self.parallel = ParallelFlow(flow, config)
        average = self.parallel.average.flow
        if flow.config.noise_std:
            average.recommended = SamplingSettings(denoise=1.0)
        average.classes = _class_names(flow, items.data)
        parameters = self.parallel.loss.parameters()
        self.optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=config.weight_decay)
        if checkpoint is None:
            self.parallel.update_average()
        else:
            self._resume(checkpoint)
        if rank() == 0:
            folder.remove_later(out, self.step)

    def steps(self, stop: StopSignals) -> Iterator[TrainMetrics]:
        """Takes the steps that are left, and yields their metrics."""
        config = self.config
        keys = keys_of_process(len(self.items.data), range(self.step, config.steps), config)
        batches = load_batches(self.items, keys, config.workers)
        while self.step < config.steps and not self.stopped:
            metrics = self._advance(batches, stop)
            is_due = self.step % config.checkpoint_every == 0 or self.step == config.steps
            if is_due and self.held_out is not None:
                metrics = replace(metrics, held_out_loss=self._held_out_loss(self.held_out))
            self._unsaved_lines.append(metrics.line())
            yield metrics
            if is_due:
                self.save()

    def _advance(self, batches: Iterator[Batch], stop: StopSignals) -> TrainMetrics:
        """Takes one step of the optimizer."""
        started, config, parallel = time.perf_counter(), self.config, self.parallel
        flow = parallel.loss.flow
        self.optimizer.zero_grad(set_to_none=True)
        loss, squares = torch.zeros((), device=flow.var.device), torch.zeros_like(flow.var)
        for part in range(config.accumulation):
            losses = parallel.backward(next(batches), is_last_part=part == config.accumulation - 1)
            loss, squares = loss + losses.loss.detach().sum(), squares + losses.square_sum
        norm = nn.utils.clip_grad_norm_(parallel.loss.parameters(), config.max_grad_norm)
        self.optimizer.param_groups[0]["lr"] = rate = config.rate(self.step)
        self.optimizer.step()
        sums = torch.cat((loss.view(1), loss.new_full((1,), stop.received), squares.flatten()))
        means = parallel.sum_over_processes(sums) / config.batch_size
        if flow.learns_prior:
            flow.var.lerp_(means[2:].view_as(flow.var), _PRIOR_MOMENTUM)
        parallel.update_average()
        self.step += 1
        self.stopped = bool(means[1])
        nats, grad_norm = means[0].item(), (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        if not math.isfinite(nats) or not math.isfinite(grad_norm):
            raise InputValueError(
                f"step {self.step}: loss {nats}, gradient norm {grad_norm}; start again in another folder, with a "
                "smaller learning rate"
            )
        self.seconds += time.perf_counter() - started
        bits = None
        if flow.image_shape is not None:
            bits = (nats + 0.5 * math.log(2 * math.pi)) / math.log(2) + 7  # The width of one of 256 levels is 2^-7.
        return TrainMetrics(self.step, nats, bits, grad_norm, rate, self.seconds)

    def _held_out_loss(self, items: NoisyItems) -> float:
        """Returns the mean loss of the averaged flow on held-out data."""
        num = len(items.data)
        share = -(-num // world_size())  # Every process runs as many batches, which sharded layers need.
        first = rank() * share
        keys = [(0, (first + i) % num) for i in range(share)]
        num_own = max(0, min(share, num - first))
        size = -(-self.config.batch_size // world_size())
        losses = [
            self.parallel.losses_of_average(batch).loss
            for batch in load_batches(items, [keys[i : i + size] for i in range(0, share, size)], self.config.workers)
        ]
        total = self.parallel.sum_over_processes(torch.cat(losses)[:num_own].sum())
        return float(total / num)

    def save(self) -> None:
        """Writes the metrics, the model folder and the checkpoint of this step, unless they are written."""
        if self._saved_step == self.step:
            return
        average = self.parallel.averaged_flow()
        if average is not None:
            if self._unsaved_lines:
                with (self.out / folder.METRICS).open("a") as file:
                    file.writelines(self._unsaved_lines)
            write_model(average.stored, self.out)
        self._unsaved_lines.clear()
        folder.write_checkpoint(self.out, self.step, self._state())
        self._saved_step = self.step
        barrier()  # All processes see the files.

    def _state(self) -> dict[str, Tensor]:
        """Returns the tensors of a checkpoint by their names."""
        optimizer = {
            f"optimizer.{name}.{key}": tensor
            for name, parameter in self.parallel.loss.named_parameters()
            for key, tensor in self.optimizer.state[parameter].items()
        }
        return {**self.parallel.state(), **optimizer, "seconds": torch.tensor(self.seconds, dtype=torch.float64)}

    def _resume(self, checkpoint: Path) -> None:
        """Reads a checkpoint."""
        for parameter in self.parallel.loss.parameters():
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
        state = self._state()
        read_state(checkpoint, state)
        self.seconds = float(state["seconds"])
