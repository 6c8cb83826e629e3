"""Maximum-likelihood training of a flow over images; a run that was stopped resumes as if it had not been."""

from __future__ import annotations

import contextlib
import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jacobiflow.data import ImageDataset
from jacobiflow.data.noise import Noise, add_noise, keyed_generator
from jacobiflow.files import remove_partials, write_atomically
from jacobiflow.flows.image_flow import ImageFlow

CHECKPOINT, METRICS = "checkpoint.pt", "metrics.jsonl"
_MIN_RATE = 1e-6
_PRIOR_RATE = 0.1
_ORDER, _NOISE = 0, 1  # streams of random numbers


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    `steps`, `warmup`, `checkpoint_every` and `sample_every` count optimiser steps. The learning rate rises linearly
    over `warmup` steps, then falls to 1e-6 by a cosine. `drop_label` is the share of labels replaced by "none", `ema`
    the decay of the averaged weights, `clip` the largest gradient norm, `bf16` autocasts to bfloat16.

    **Raises** `ValueError` where a value is out of range.
    """

    steps: int
    noise: Noise = field(default_factory=lambda: Noise("gaussian", 0.1))
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    warmup: int = 200
    ema: float = 0.999
    clip: float = 1.0
    drop_label: float = 0.1
    bf16: bool = True
    seed: int = 0
    checkpoint_every: int = 100
    sample_every: int = 1000

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every", "sample_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a positive whole number")
        for name in ("drop_label", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a number from 0 to below 1")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: give a positive number")
        for name in ("weight_decay", "warmup"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: give 0 or a positive number")

    def rate(self, step: int) -> float:
        """Learning rate of `step`, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return _MIN_RATE + 0.5 * (self.learning_rate - _MIN_RATE) * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class StepReport:
    """One optimiser step, counted from 1.

    `bits_per_dim` is of the noisy (or dequantised) training batch, under a standard normal prior. `grad_norm` is before
    clipping. `seconds` are those of training so far, over all runs.
    """

    step: int
    loss: float
    bits_per_dim: float
    grad_norm: float
    rate: float
    seconds: float


def train(
    flow: ImageFlow,
    data: ImageDataset,
    config: TrainConfig,
    out: str | Path,
    on_step: Callable[[StepReport], None] | None = None,
    on_sample: Callable[[ImageFlow, int], None] | None = None,
) -> ImageFlow:
    """Minimise mean(z^2) / 2 - log-det / D over images with their noise; returns the averaged weights.

    `out` gets `checkpoint.pt` every `checkpoint_every` steps and on an interruption (unless in the middle of an
    update), `metrics.jsonl`, and at the end the model folder of the averaged weights. With the same `out` again,
    training resumes from the checkpoint. The images, noise and dropped labels of a step depend only on the seed and the
    step. A flow without scales also learns its prior variance, as a moving average of z^2. The first batch initialises
    the flow, see `ImageFlow.initialize`.

    **Arguments:** `on_step` is called with the report of every step, `on_sample` with the averaged flow and the step,
    every `sample_every` steps.

    **Raises** `ValueError` where the data do not fit the flow, the checkpoint in `out` is broken or of another flow, or
    the loss is not finite; the last checkpoint is kept.
    """
    _check(flow, data, config)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    run = _Run(flow, config, out)
    run.resume()
    per_epoch = len(data) // config.batch_size
    order, epoch = torch.empty(0), -1
    try:
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
    finally:
        if run.whole:
            run.save()
    run.average.save_pretrained(out)
    return run.average


def _check(flow: ImageFlow, data: ImageDataset, config: TrainConfig) -> None:
    """**Raises** `ValueError` where the flow, the data and the configuration do not fit each other."""
    shape = (flow.config.in_channels, flow.config.image_size, flow.config.image_size)
    if tuple(data.images.shape[1:]) != shape:
        raise ValueError(f"images are {tuple(data.images.shape[1:])}, the flow takes {shape}")
    if flow.config.num_classes and data.labels is not None and int(data.labels.max()) >= flow.config.num_classes:
        raise ValueError(f"label {int(data.labels.max())}: the flow has classes 0 to {flow.config.num_classes - 1}")
    if len(data) < config.batch_size:
        raise ValueError(f"batch_size={config.batch_size}: there are only {len(data)} images")
    if config.noise.std != flow.config.noise_std:
        raise ValueError(
            f"noise of std {config.noise.std}, but the flow's config has noise_std={flow.config.noise_std}"
        )


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The `StepReport`s in the `metrics.jsonl` of `folder`, as dicts; lines that a kill cut short are left out."""
    steps: dict[int, dict[str, Any]] = {}
    for line in (Path(folder) / METRICS).read_text().splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            figures = json.loads(line)
            steps[figures["step"]] = figures
    return list(steps.values())


class _Run:
    """The state of a training run: what a checkpoint holds, and the metrics not yet written."""

    def __init__(self, flow: ImageFlow, config: TrainConfig, out: Path) -> None:
        self.flow, self.config, self.out = flow, config, out
        self.average = type(flow)(flow.config).to(flow.var.device)
        self.average.load_state_dict(flow.state_dict())
        self.average.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            flow.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay
        )
        self.step = 0
        self.seconds = 0.0
        self.metrics: list[str] = []
        self.whole = True  # False while a step is half done: then no checkpoint may be written

    def advance(self, images: Tensor, labels: Tensor | None, started: float) -> StepReport:
        """One optimiser step on a batch."""
        config, device, rate = self.config, self.flow.var.device, self.config.rate(self.step)
        generator = keyed_generator(config.seed, _NOISE, self.step)
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
            raise ValueError(
                f"step {self.step}: loss {value}, gradient norm {norm.item()}; resume from the last checkpoint with a "
                "smaller learning rate"
            )
        self.seconds += time.perf_counter() - started
        bits = (value + 0.5 * math.log(2 * math.pi)) / math.log(2) + 7
        report = StepReport(self.step, value, bits, norm.item(), rate, self.seconds)
        self.metrics.append(json.dumps({name: round(x, 6) for name, x in asdict(report).items()}) + "\n")
        self.whole = True
        return report

    @torch.no_grad()
    def _update_average(self) -> None:
        # The decay rises to `ema`, so that the average soon forgets the initial weights.
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.flow.parameters()), 1 - decay)
        self.average.var.copy_(self.flow.var)

    def save(self) -> None:
        """Write metrics, then the checkpoint."""
        with (self.out / METRICS).open("a") as log:
            log.writelines(self.metrics)
        self.metrics.clear()
        state = {
            "step": self.step, "seconds": self.seconds, "flow_config": asdict(self.flow.config),
            "flow": self.flow.state_dict(), "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        data = io.BytesIO()
        torch.save(state, data)
        write_atomically(self.out / CHECKPOINT, data.getvalue())

    def resume(self) -> None:
        """Read the checkpoint, if there is one; drop metrics of later steps, and files that a kill left incomplete."""
        path, log = self.out / CHECKPOINT, self.out / METRICS
        remove_partials(self.out)
        if path.exists():
            self._load(path)
        if log.exists():
            kept = [json.dumps(figures) + "\n" for figures in read_metrics(self.out) if figures["step"] <= self.step]
            write_atomically(log, "".join(kept).encode())

    def _load(self, path: Path) -> None:
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            have, wanted = state["flow_config"], asdict(self.flow.config)
            others = [f"{name}={have[name]}, not {wanted[name]}" for name in wanted if have[name] != wanted[name]]
            if not others:
                self.step, self.seconds = _counts(state)
                self.flow.load_state_dict(state["flow"])
                self.average.load_state_dict(state["average"])
                self.optimizer.load_state_dict(state["optimizer"])
        except Exception as error:  # torch.load documents none, and damage can raise nearly any
            raise ValueError(f"{path}: not a checkpoint of this trainer; remove it or give another folder") from error
        if others:
            raise ValueError(f"{path}: of another flow ({'; '.join(others)}); give its settings, or another folder")


def _counts(state: dict[str, Any]) -> tuple[int, float]:
    """Step and seconds of a checkpoint. **Raises** `ValueError` where they are no counts."""
    step, seconds = state["step"], state["seconds"]
    if type(step) is not int or step < 0 or not 0 <= seconds < math.inf:
        raise ValueError(f"step {step!r}, seconds {seconds!r}")
    return step, seconds
