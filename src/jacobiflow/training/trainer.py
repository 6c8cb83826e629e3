"""Maximum-likelihood training of a flow over images; a run that was stopped resumes as if it had not been."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jacobiflow.checks import check_kind
from jacobiflow.data import ImageDataset
from jacobiflow.data.augmentation import augment
from jacobiflow.data.noise import add_noise, keyed_generator
from jacobiflow.errors import InputValueError
from jacobiflow.files import write_atomically
from jacobiflow.flows.folder import locked_folder, remove_half_written, write_model
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.training.checkpoint import CHECKPOINT, Checkpoint, describe
from jacobiflow.training.config import TrainConfig
from jacobiflow.training.folder import check_folder
from jacobiflow.training.metrics import METRICS, StepReport, read_metrics

_PRIOR_RATE = 0.1
_ORDER, _NOISE = 0, 1  # streams of random numbers


def train(
    flow: ImageFlow,
    data: ImageDataset,
    config: TrainConfig,
    out: str | Path,
    on_step: Callable[[StepReport], None] | None = None,
    on_sample: Callable[[ImageFlow, int], None] | None = None,
    on_start: Callable[[int], None] | None = None,
) -> ImageFlow:
    """Minimise mean(z^2) / 2 - log-det / D over images with their noise; returns the averaged weights.

    `out` gets `checkpoint.pt` every `checkpoint_every` steps and on an interruption (unless in the middle of an
    update), `metrics.jsonl`, and at the end the model folder of the averaged weights. With the same `out` again,
    training resumes from the checkpoint; `steps`, `checkpoint_every` and `sample_every` may then be others, and all
    else must be the same. The images, noise and dropped labels of a step depend only on the seed and the step. A flow
    without scales also learns its prior variance, as a moving average of z^2. The first batch initialises the flow, see
    `ImageFlow.initialize`. One process at a time trains in a folder.

    **Arguments:** `on_start` is called with the steps that are done already, before anything is written; `on_step` with
    the report of every step; `on_sample` with the averaged flow and the step, every `sample_every` steps.

    **Raises** `ValueError` where the data do not fit the flow, what is in `out` is broken or not of this run, or the
    loss is not finite; `FolderInUseError`, a `ValueError`, where another process trains in `out`. Nothing is lost.
    """
    _check(flow, data, config)
    out = Path(out)
    with locked_folder(out):
        run = _Run(flow, config, out, describe(data, flow))
        run.resume()
        if on_start is not None:
            on_start(run.step)
        run.clear()
        try:
            _steps(run, data, on_step, on_sample)
        finally:
            if run.whole:
                run.save()
        write_model(run.average, out)
    return run.average


def _steps(
    run: _Run,
    data: ImageDataset,
    on_step: Callable[[StepReport], None] | None,
    on_sample: Callable[[ImageFlow, int], None] | None,
) -> None:
    """The steps that are left."""
    config, per_epoch = run.config, len(data) // run.config.batch_size
    order, epoch = torch.empty(0), -1
    while run.step < config.steps:
        started = time.perf_counter()
        if run.step // per_epoch != epoch:
            epoch = run.step // per_epoch
            order = torch.randperm(len(data), generator=keyed_generator(config.seed, _ORDER, epoch))
        at = run.step % per_epoch * config.batch_size
        report = run.advance(*data.batch(order[at : at + config.batch_size]), started)
        if on_step is not None:
            on_step(report)
        if run.step % config.checkpoint_every == 0:
            run.save()
        if on_sample is not None and run.step % config.sample_every == 0:
            on_sample(run.average, run.step)


def _check(flow: ImageFlow, data: ImageDataset, config: TrainConfig) -> None:
    """**Raises** `ValueError` where the flow, the data and the configuration do not fit each other."""
    check_kind("flow", flow, ImageFlow, "an ImageFlow, such as jacobiflow.TarFlow(config)")
    check_kind("data", data, ImageDataset, "an ImageDataset, such as jacobiflow.data.load_images gives")
    check_kind("config", config, TrainConfig, "a TrainConfig")
    shape = (flow.config.in_channels, flow.config.image_size, flow.config.image_size)
    if tuple(data.images.shape[1:]) != shape:
        raise InputValueError(f"images are {tuple(data.images.shape[1:])}, the flow takes {shape}")
    if flow.config.num_classes and data.labels is not None and int(data.labels.max()) >= flow.config.num_classes:
        raise InputValueError(
            f"label {int(data.labels.max())}: the flow has classes 0 to {flow.config.num_classes - 1}"
        )
    if len(data) < config.batch_size:
        raise InputValueError(f"batch_size={config.batch_size}: there are only {len(data)} images")
    if config.noise.std != flow.config.noise_std:
        raise InputValueError(
            f"noise of std {config.noise.std}, but the flow's config has noise_std={flow.config.noise_std}"
        )


class _Run:
    """The state of a training run: what a checkpoint holds, and the metrics not yet written."""

    def __init__(self, flow: ImageFlow, config: TrainConfig, out: Path, data: dict[str, Any]) -> None:
        self.flow, self.config, self.out, self.data = flow, config, out, data
        self.average = type(flow)(flow.config).to(flow.var.device)
        self.average.load_state_dict(flow.state_dict())
        self.average.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            flow.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay
        )
        self.step = self.saved = 0
        self.seconds = 0.0
        self.metrics: list[str] = []
        self.whole = True  # False while a step is half done: then no checkpoint may be written

    def advance(self, images: Tensor, labels: Tensor | None, started: float) -> StepReport:
        """One optimiser step on a batch."""
        config, device, rate = self.config, self.flow.var.device, self.config.rate(self.step)
        generator = keyed_generator(config.seed, _NOISE, self.step)
        images = augment(images, config.augmentation, generator)
        images = add_noise(images, config.noise, generator).to(device)
        if labels is not None and self.flow.config.num_classes:
            dropped = torch.rand(labels.shape, generator=generator) < config.drop_label
            labels = labels.masked_fill(dropped, -1).to(device)
        else:
            labels = None
        if self.step == 0:
            self.whole = False  # it must not be done twice
            self.flow.initialize(images, labels)
            self.average.load_state_dict(self.flow.state_dict())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            z, log_det = self.flow.normalize(images, labels)
        loss = 0.5 * z.square().mean() - log_det.mean() / z[0].numel()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.flow.parameters(), config.clip)
        self.whole = False
        self.optimizer.step()
        if self.flow.learns_prior:
            self.flow.var.lerp_(z.detach().square().mean(dim=0), _PRIOR_RATE)
        self._update_average()
        self.step += 1
        value = loss.item()
        if not math.isfinite(value) or not math.isfinite(norm):
            raise InputValueError(
                f"step {self.step}: loss {value}, gradient norm {norm.item()}; start again in another folder, with "
                "a smaller learning rate"
            )
        self.seconds += time.perf_counter() - started
        bits = (value + 0.5 * math.log(2 * math.pi)) / math.log(2) + 7
        report = StepReport(self.step, value, bits, norm.item(), rate, self.seconds)
        self.metrics.append(report.line())
        self.whole = True
        return report

    @torch.no_grad()
    def _update_average(self) -> None:
        # The decay rises to `ema`, so that the average soon forgets the initial weights.
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.flow.parameters()), 1 - decay)
        self.average.var.copy_(self.flow.var)

    def save(self) -> None:
        """Write metrics, then the checkpoint, where a step was made since the last one."""
        if self.step == self.saved:
            return
        with (self.out / METRICS).open("a") as log:
            log.writelines(self.metrics)
        self.metrics.clear()
        Checkpoint(
            self.step, self.seconds, asdict(self.flow.config), self.flow.state_dict(), self.average.state_dict(),
            self.optimizer.state_dict(), self.config.fixed(), self.data,
        ).write(self.out / CHECKPOINT)  # fmt: skip
        self.saved = self.step

    def resume(self) -> None:
        """Go to where the run in the folder stopped; nothing is written. **Raises** `ValueError` as `train` does."""
        state = check_folder(self.out, self.flow, self.config, self.data)
        if state is not None:
            self.step, self.seconds, self.saved = state.step, state.seconds, state.step
            self.flow.load_state_dict(state.flow)
            self.average.load_state_dict(state.average)
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state.optimizer["state"], "param_groups": groups})

    def clear(self) -> None:
        """Drop metrics of steps that no checkpoint has, and files that a kill left incomplete."""
        remove_half_written(self.out)
        log = self.out / METRICS
        if log.exists():
            kept = [json.dumps(figures) + "\n" for figures in read_metrics(self.out) if figures["step"] <= self.step]
            write_atomically(log, "".join(kept).encode())
