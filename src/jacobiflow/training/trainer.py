"""Maximum-likelihood training of a flow over images, with checkpoints to resume from."""

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
from jacobiflow.utils.files import locked, remove_partials, write_atomically
from jacobiflow.utils.progress import Progress

_MAX_STEPS = 10**9
_MIN_LEARNING_RATE = 1e-6
_PRIOR_MOMENTUM = 0.1  # Weight of the newest batch in the moving average of z^2.
_ORDER, _NOISE = 0, 1  # The random streams of the order of the images, and of their noise.
_MAY_CHANGE = frozenset({"steps", "checkpoint_every", "sample_every"})  # Settings that may differ on resume.


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Args:
        steps: Optimizer steps in all, those of earlier runs included.
        noise: The noise of the images. Its `std` must be the `noise_std` of the flow's config.
        augmentation: Random changes of the images.
        batch_size: Images in a step.
        learning_rate: Peak learning rate of AdamW. It is reached after `warmup` steps, then falls to 1e-6 by a cosine.
        weight_decay: Weight decay of AdamW.
        warmup: Steps over which the learning rate rises linearly.
        ema_decay: Decay of the exponential moving average of the weights.
        max_grad_norm: Gradients with a larger norm are clipped to it.
        label_dropout: Probability of dropping a label, for classifier-free guidance.
        bf16: Whether to run the forward pass under autocast to bfloat16.
        seed: Seed of the order of the images, their noise and the dropped labels.
        checkpoint_every: Steps between checkpoints.
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
    ema_decay: float = 0.999
    max_grad_norm: float = 1.0
    label_dropout: float = 0.1
    bf16: bool = True
    seed: int = 0
    checkpoint_every: int = 100
    sample_every: int = 500

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("steps", "batch_size", "checkpoint_every", "sample_every"):
            check_count(name, getattr(self, name), maximum=_MAX_STEPS)
        for name, most in (("warmup", _MAX_STEPS), ("seed", 2**63 - 1)):
            check_count(name, getattr(self, name), minimum=0, maximum=most)
        for name in ("label_dropout", "ema_decay"):
            check_number(name, getattr(self, name), expected="a number from 0 to below 1", below=1)
        for name in ("learning_rate", "max_grad_norm"):
            check_positive(name, getattr(self, name))
        check_number("weight_decay", self.weight_decay)

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return _MIN_LEARNING_RATE + 0.5 * (self.learning_rate - _MIN_LEARNING_RATE) * (1 + math.cos(math.pi * progress))


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
    """Trains a flow on noisy images by maximum likelihood.

    The loss is mean(z^2) / 2 - log-det / D. A flow without scales also learns its prior variance, as a moving average
    of z^2. The first batch initialises the flow, see `Flow.initialize`. The images, noise and dropped labels of a
    step depend on the seed and the step only. A model of images with Gaussian noise recommends a denoising step at rate
    1, since its samples have that noise.

    A second call with the same `out` resumes from the checkpoint. It ends with the weights of a run without a stop.
    Only `steps`, `checkpoint_every` and `sample_every` may differ.

    Args:
        flow: The flow, which is trained in place.
        data: The images and their labels.
        config: The settings of the run.
        out: The folder of the run, which is new or empty at first. Training writes `metrics.jsonl` and `checkpoint.pt`
            there every `checkpoint_every` steps and on an interruption, and in the end the averaged model.
        on_step: Called with the metrics of every step.
        on_sample: Called with the averaged flow and the step, every `sample_every` steps.
        progress: Called after every step.
        contexts: For a flow with another context than labels: one row for each label, and a last row that stands for a
            dropped label.

    Returns:
        The flow with averaged weights.

    Raises:
        ValueError: If the data do not fit the flow, if another run uses `out`, if `out` holds other files, or if the
            loss is not finite. The last checkpoint stays.

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
    out, steps_per_epoch = Path(out), len(data) // config.batch_size
    with locked(out):
        check_own_model(out)
        run = _Run(flow, config, out, _describe(flow, config, data, contexts), contexts)
        order, epoch = torch.empty(0), -1
        try:
            while run.step < config.steps:
                if run.step // steps_per_epoch != epoch:
                    epoch = run.step // steps_per_epoch
                    order = torch.randperm(len(data), generator=keyed_generator(config.seed, _ORDER, epoch))
                first = run.step % steps_per_epoch * config.batch_size
                metrics = run.advance(*data.batch(order[first : first + config.batch_size]))
                if on_step is not None:
                    on_step(metrics)
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
    shape = tuple(data.images.shape[1:])
    if shape != flow.require_images():
        raise InputValueError(f"images are {shape}, the flow takes {flow.require_images()}")
    if flow.config.num_classes and data.labels is not None:
        flow.check_labels(data.labels, len(data))
    if contexts is not None and (data.labels is None or int(data.labels.max()) >= len(contexts) - 1):
        raise InputValueError(
            f"contexts: {len(contexts)} rows; give one for each label of the images, and last one for a dropped label"
        )
    if len(data) < config.batch_size:
        raise InputValueError(f"batch_size={config.batch_size}: there are only {len(data)} images")
    noise_std = flow.config.noise_std
    if config.noise.std != noise_std:
        raise InputValueError(f"noise of std {config.noise.std}, but the flow's config has noise_std={noise_std}")


def _describe(flow: Flow, config: TrainConfig, data: ImageDataset, contexts: Tensor | None) -> dict[str, Any]:
    """Returns the flow, settings and images that must not differ on resume."""
    digest = hashlib.sha256(data.images.contiguous().numpy().data)
    if (flow.config.num_classes or contexts is not None) and data.labels is not None:
        digest.update(data.labels.contiguous().numpy().data)
    if contexts is not None:
        digest.update(contexts.contiguous().numpy().data)
    settings = {name: value for name, value in asdict(config).items() if name not in _MAY_CHANGE}
    images = f"{len(data):,} with checksum {digest.hexdigest()[:16]}"
    return {"flow": flow.model_type, **asdict(flow.config), **settings, "images": images}


class _Run:
    """The state of a training run. While `is_updating` is true, it is between two steps and must not be saved."""

    def __init__(
        self, flow: Flow, config: TrainConfig, out: Path, description: dict[str, Any], contexts: Tensor | None
    ) -> None:
        self.flow, self.config, self.out, self.description, self.contexts = flow, config, out, description, contexts
        self.average = type(flow)(flow.config).to(flow.var.device)
        self.average.load_state_dict(flow.state_dict())
        self.average.requires_grad_(False)
        if config.noise.std:
            self.average.recommended = SamplingSettings(denoise=1.0)
        self.optimizer = torch.optim.AdamW(
            flow.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay
        )
        self.step, self.last_saved_step, self.seconds = 0, -1, 0.0
        self.unsaved_metrics: list[str] = []  # Lines of metrics.jsonl.
        self.is_updating = False
        checkpoint = last_checkpoint(out, description)
        if checkpoint is None:
            self.save()
        else:
            self._resume(checkpoint)

    def advance(self, images: Tensor, labels: Tensor | None) -> TrainMetrics:
        """Takes one optimizer step on a batch."""
        started = time.perf_counter()
        images, context = self._prepare(images, labels)
        if self.step == 0:
            self.is_updating = True  # A resumed run must not initialise twice.
            self.flow.initialize(images, context)
            self.average.load_state_dict(self.flow.state_dict())
        rate = self.config.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.config.bf16):
            z, log_det = self.flow.normalize(images, context)
        loss = 0.5 * z.square().mean() - log_det.mean() / z[0].numel()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.flow.parameters(), self.config.max_grad_norm)
        self.is_updating = True
        self.optimizer.step()
        if self.flow.learns_prior:
            self.flow.var.lerp_(z.detach().square().mean(dim=0), _PRIOR_MOMENTUM)
        self._update_average()
        self.step += 1
        nats, grad_norm = loss.item(), norm.item()
        if not math.isfinite(nats) or not math.isfinite(grad_norm):
            raise InputValueError(
                f"step {self.step}: loss {nats}, gradient norm {grad_norm}; start again in another folder, with a "
                "smaller learning rate"
            )
        self.seconds += time.perf_counter() - started
        bits = (nats + 0.5 * math.log(2 * math.pi)) / math.log(2) + 7  # The width of one of 256 levels is 2^-7.
        metrics = TrainMetrics(self.step, nats, bits, grad_norm, rate, self.seconds)
        self.unsaved_metrics.append(metrics.line())
        self.is_updating = False
        return metrics

    def _prepare(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns the augmented, noisy images of a step and their context."""
        config, device = self.config, self.flow.var.device
        generator = keyed_generator(config.seed, _NOISE, self.step)
        images = augment(images, config.augmentation, generator)
        images = add_noise(images, config.noise, generator).to(device)
        if labels is None or not (self.flow.config.num_classes or self.contexts is not None):
            return images, None
        is_dropped = torch.rand(labels.shape, generator=generator) < config.label_dropout
        labels = labels.masked_fill(is_dropped, -1)
        return images, (labels if self.contexts is None else self.contexts[labels]).to(device)

    @torch.no_grad()
    def _update_average(self) -> None:
        # The decay rises to `ema_decay`, so that the average soon forgets the initial weights.
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.flow.parameters()), 1 - decay)
        self.average.var.copy_(self.flow.var)

    def save(self) -> None:
        """Writes the metrics, then the checkpoint, unless the last checkpoint is of this step."""
        if self.step == self.last_saved_step:
            return
        if self.unsaved_metrics:
            with (self.out / METRICS).open("a") as log:
                log.writelines(self.unsaved_metrics)
            self.unsaved_metrics.clear()
        Checkpoint(
            self.description, self.step, self.seconds, self.flow.state_dict(), self.average.state_dict(),
            self.optimizer.state_dict(),
        ).write(self.out / CHECKPOINT)  # fmt: skip
        self.last_saved_step = self.step

    def _resume(self, checkpoint: Checkpoint) -> None:
        """Restores a checkpoint, and removes metrics of later steps and temporary files of killed processes."""
        metrics = read_metrics(self.out)
        self.flow.load_state_dict(checkpoint.flow)
        self.average.load_state_dict(checkpoint.average)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.step = self.last_saved_step = checkpoint.step
        self.seconds = checkpoint.seconds
        for name in (CHECKPOINT, METRICS):
            remove_partials(self.out, name)
        lines = [step.line() for step in metrics if step.step <= self.step]
        write_atomically(self.out / METRICS, "".join(lines).encode())
