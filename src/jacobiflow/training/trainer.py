"""Maximum-likelihood training of a flow over images; a run that was stopped resumes as if it had not been."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacobiflow.blocks.guidance import SamplingSettings
from jacobiflow.data import Augmentation, ImageDataset, Noise, add_noise, augment
from jacobiflow.data.augmentation import keyed_generator
from jacobiflow.errors import InputValueError
from jacobiflow.models.checkpoints.folder import check_own_model, write_model
from jacobiflow.models.flow import Flow
from jacobiflow.training.folder import CHECKPOINT, METRICS, Checkpoint, TrainMetrics, last_checkpoint, read_metrics
from jacobiflow.utils.checks import check_count, check_fields, check_kind, check_number, check_positive
from jacobiflow.utils.files import locked, partials, write_atomically
from jacobiflow.utils.progress import Progress

_MOST_STEPS = 10**9
_MIN_RATE = 1e-6
_PRIOR_RATE = 0.1
_ORDER, _NOISE = 0, 1  # streams of random numbers
_MAY_CHANGE = frozenset({"steps", "checkpoint_every", "sample_every"})  # in a run that is resumed


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Args:
        steps: Optimiser steps in all.
        noise: The noise of the images. Its `std` must be that of the flow's config.
        learning_rate: Peak rate of AdamW. The rate rises linearly over `warmup` steps, then falls to 1e-6 by a cosine.
        warmup: Steps of linear warm-up.
        ema: Decay of the averaged weights.
        clip: Largest gradient norm.
        drop_label: Share of labels that are dropped, for classifier-free guidance.
        bf16: Whether the forward pass is autocast to bfloat16.
        seed: Fixes the order of the images, their noise and the dropped labels.
        sample_every: Steps between calls of `on_sample`.

    Example:
        >>> config = TrainConfig(steps=110, learning_rate=0.02, warmup=10)
        >>> config.rate(0), config.rate(9), config.rate(110)
        (0.002, 0.02, 1e-06)
    """

    steps: int
    noise: Noise = field(default_factory=lambda: Noise("gaussian", 0.1))
    augmentation: Augmentation = field(default_factory=Augmentation)
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
    sample_every: int = 500

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("steps", "batch_size", "checkpoint_every", "sample_every"):
            check_count(name, getattr(self, name), maximum=_MOST_STEPS)
        for name, most in (("warmup", _MOST_STEPS), ("seed", 2**63 - 1)):
            check_count(name, getattr(self, name), minimum=0, maximum=most)
        for name in ("drop_label", "ema"):
            check_number(name, getattr(self, name), expected="a number from 0 to below 1", below=1)
        for name in ("learning_rate", "clip"):
            check_positive(name, getattr(self, name))
        check_number("weight_decay", self.weight_decay)

    def rate(self, step: int) -> float:
        """Returns the learning rate of `step`, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return _MIN_RATE + 0.5 * (self.learning_rate - _MIN_RATE) * (1 + math.cos(math.pi * progress))


def train(
    flow: Flow,
    data: ImageDataset,
    config: TrainConfig,
    out: str | Path,
    on_step: Callable[[TrainMetrics], None] | None = None,
    on_sample: Callable[[Flow, int], None] | None = None,
    progress: Progress | None = None,
    contexts: Float[Tensor, "k ..."] | None = None,
) -> Flow:
    """Trains a flow by maximum likelihood, on images with noise.

    The loss is mean(z^2) / 2 - log-det / D. A flow without scales also learns its prior variance, as a moving average
    of z^2. The first batch initialises the flow, see `Flow.initialize`. The images, noise and dropped labels of a
    step depend only on the seed and the step. A model of images with Gaussian noise recommends a denoising step at
    rate 1, since its samples have that noise.

    With the same `out` again, training resumes from the checkpoint, and ends with the same weights as without the stop.
    `steps`, `checkpoint_every` and `sample_every` may then be others; all else must be the same.

    Args:
        flow: The flow, which is trained in place.
        out: A new or empty folder, or that of the run. It gets `checkpoint.pt` every `checkpoint_every` steps and when
            training is interrupted, `metrics.jsonl`, and at the end the model folder of the averaged weights.
        on_step: Called with the report of every step.
        on_sample: Called with the averaged flow and the step, every `sample_every` steps.
        contexts: For a flow whose context is not labels: the context of each label, and last that of dropped ones.

    Returns:
        The flow with averaged weights.

    Raises:
        ValueError: If the data do not fit the flow, `out` is in use or has other files or another run, or the loss is
            not finite; the last checkpoint stays.

    Example:
        >>> import tempfile
        >>> from jacobiflow.data import Noise, digits
        >>> flow = jf.MAF(jf.MAFConfig(1, 8, hidden_features=16, num_blocks=2))
        >>> config = TrainConfig(steps=2, noise=Noise("uniform"))
        >>> with tempfile.TemporaryDirectory() as out:
        ...     train(flow, digits(), config, out).config == jf.load(out).config
        True
    """
    _check(flow, data, config, contexts)
    out, per_epoch = Path(out), len(data) // config.batch_size
    with locked(out):
        check_own_model(out)  # refuses files that the model at the end could not replace
        run = _Run(flow, config, out, _describe(flow, config, data, contexts), contexts)
        order, epoch = torch.empty(0), -1
        try:
            while run.step < config.steps:
                if run.step // per_epoch != epoch:
                    epoch = run.step // per_epoch
                    order = torch.randperm(len(data), generator=keyed_generator(config.seed, _ORDER, epoch))
                first = run.step % per_epoch * config.batch_size
                report = run.advance(*data.batch(order[first : first + config.batch_size]))
                if on_step is not None:
                    on_step(report)
                if progress is not None:
                    progress(run.step, config.steps, "training")
                if run.step % config.checkpoint_every == 0:
                    run.save()
                if on_sample is not None and run.step % config.sample_every == 0:
                    on_sample(run.average, run.step)
        finally:
            if not run.is_updating:
                run.save()
        write_model(run.average, out)
    return run.average


def _check(flow: Flow, data: ImageDataset, config: TrainConfig, contexts: Tensor | None) -> None:
    """Raises ValueError if the flow, the data and the configuration do not fit each other."""
    check_kind("flow", flow, Flow, "a Flow, such as jacobiflow.TarFlow(config)")
    check_kind("data", data, ImageDataset, "an ImageDataset, such as jacobiflow.data.load_images gives")
    check_kind("config", config, TrainConfig, "a TrainConfig")
    takes, have, shape = flow.config, tuple(data.images.shape[1:]), flow.require_images()
    if have != shape:
        raise InputValueError(f"images are {have}, the flow takes {shape}")
    if takes.num_classes and data.labels is not None:
        flow.check_labels(data.labels, len(data))
    if contexts is not None and (data.labels is None or int(data.labels.max()) >= len(contexts) - 1):
        raise InputValueError(
            f"contexts: {len(contexts)} rows; give one for each label of the images, and last one for a dropped label"
        )
    if len(data) < config.batch_size:
        raise InputValueError(f"batch_size={config.batch_size}: there are only {len(data)} images")
    if config.noise.std != takes.noise_std:
        raise InputValueError(f"noise of std {config.noise.std}, but the flow's config has noise_std={takes.noise_std}")


def _describe(flow: Flow, config: TrainConfig, data: ImageDataset, contexts: Tensor | None) -> dict[str, Any]:
    """Describes what a resumed run must share with the run before: the flow, the settings, and the images."""
    digest = hashlib.sha256(data.images.contiguous().numpy().data)
    if (flow.config.num_classes or contexts is not None) and data.labels is not None:
        digest.update(data.labels.contiguous().numpy().data)
    if contexts is not None:
        digest.update(contexts.contiguous().numpy().data)
    settings = {name: value for name, value in asdict(config).items() if name not in _MAY_CHANGE}
    images = f"{len(data):,} with checksum {digest.hexdigest()[:16]}"
    return {"flow": flow.model_type, **asdict(flow.config), **settings, "images": images}


class _Run:
    """The state of a training run. `is_updating` is true in an update, when no checkpoint may be written."""

    def __init__(
        self, flow: Flow, config: TrainConfig, out: Path, description: dict[str, Any], contexts: Tensor | None
    ) -> None:
        self.contexts = contexts
        self.flow, self.config, self.out, self.description = flow, config, out, description
        self.average = type(flow)(flow.config).to(flow.var.device)
        self.average.load_state_dict(flow.state_dict())
        self.average.requires_grad_(False)
        if config.noise.std:  # samples have the noise of the training images, which one step removes
            self.average.recommended = SamplingSettings(denoise=1.0)
        self.optimizer = torch.optim.AdamW(
            flow.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay
        )
        self.step, self.saved, self.seconds = 0, -1, 0.0
        self.metrics: list[str] = []
        self.is_updating = False
        checkpoint = last_checkpoint(out, description)
        if checkpoint is None:
            self.save()
        else:
            self._resume(checkpoint)

    def advance(self, images: Tensor, labels: Tensor | None) -> TrainMetrics:
        """Does one optimiser step on a batch."""
        started = time.perf_counter()
        config, device, rate = self.config, self.flow.var.device, self.config.rate(self.step)
        generator = keyed_generator(config.seed, _NOISE, self.step)
        images = augment(images, config.augmentation, generator)
        images = add_noise(images, config.noise, generator).to(device)
        labels = labels if self.flow.config.num_classes or self.contexts is not None else None
        context = None
        if labels is not None:
            dropped = torch.rand(labels.shape, generator=generator) < config.drop_label
            labels = labels.masked_fill(dropped, -1)
            context = (labels if self.contexts is None else self.contexts[labels]).to(device)
        if self.step == 0:
            self.is_updating = True  # a resumed run must not initialise twice
            self.flow.initialize(images, context)
            self.average.load_state_dict(self.flow.state_dict())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            z, log_det = self.flow.normalize(images, context)
        loss = 0.5 * z.square().mean() - log_det.mean() / z[0].numel()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.flow.parameters(), config.clip)
        self.is_updating = True
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
        report = TrainMetrics(self.step, value, bits, norm.item(), rate, self.seconds)
        self.metrics.append(report.line())
        self.is_updating = False
        return report

    @torch.no_grad()
    def _update_average(self) -> None:
        # The decay rises to `ema`, so that the average soon forgets the initial weights.
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.flow.parameters()), 1 - decay)
        self.average.var.copy_(self.flow.var)

    def save(self) -> None:
        """Writes metrics, then the checkpoint, if there was a step since the last one."""
        if self.step == self.saved:
            return
        if self.metrics:
            with (self.out / METRICS).open("a") as log:
                log.writelines(self.metrics)
            self.metrics.clear()
        Checkpoint(
            self.description, self.step, self.seconds, self.flow.state_dict(), self.average.state_dict(),
            self.optimizer.state_dict(),
        ).write(self.out / CHECKPOINT)  # fmt: skip
        self.saved = self.step

    def _resume(self, checkpoint: Checkpoint) -> None:
        """Goes to where the run stopped, and drops metrics of later steps and files that a kill left incomplete."""
        reports = read_metrics(self.out)
        self.flow.load_state_dict(checkpoint.flow)
        self.average.load_state_dict(checkpoint.average)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.step = self.saved = checkpoint.step
        self.seconds = checkpoint.seconds
        for partial in (*partials(self.out, CHECKPOINT), *partials(self.out, METRICS)):  # others tell of a model
            partial.unlink()
        lines = [report.line() for report in reports if report.step <= self.step]
        write_atomically(self.out / METRICS, "".join(lines).encode())
