"""The spec of a folder of samples: all that its shards depend on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from jacobiflow.blocks.context import Context
from jacobiflow.blocks.guidance import DenoiseDtype, Guidance
from jacobiflow.data.grid import PICTURE_CHANNELS
from jacobiflow.errors import InputValueError
from jacobiflow.fixed_point import CertifyMode
from jacobiflow.models.checkpoints.fingerprint import fingerprint, weights_sha256
from jacobiflow.models.latents import MAX_SAMPLES
from jacobiflow.planner import Auto
from jacobiflow.sampling.encoding import to_numpy
from jacobiflow.sampling.request import SamplingRequest
from jacobiflow.utils.files import json_bytes, sha256

KIND, VERSION, OLDEST, RESULT = "samples", 5, 4, "outcome.json"
STRATEGY = "strategy"
"""The name of the unit that plans the strategy."""
Count = Annotated[int, msgspec.Meta(ge=1)]
Files = Literal["npz", "png"]
_MAX_SHARDS = 100_000
_MAX_NAME_LENGTH = 60  # Characters of a class's name in the name of a folder.


@dataclass(frozen=True)
class SampleSpec:
    """All that the shards of a folder of samples depend on.

    Attributes:
        flow_sha256: Fingerprint of the flow, which is the same in another dtype.
        num: Number of samples.
        shape: Shape of a sample: (C, H, W) for images, (T, C) for tokens.
        labels_or_context_sha256: Checksum of the labels as little-endian int64, or of another context as float32.
        classes: The names of the classes, which the folders of PNGs have; empty without names.
        shard_size: Samples in a shard. Shard i begins with sample `shard_size * i`.
        dtype: The dtype of the network, or "tf32".
        strategy: The name of the strategy, or the path of its file.
        strategy_sha256: Checksum of the strategy; None for "auto", whose plan depends on timings.
        tolerance: The largest residual of a certified sample; None if the strategy promises nothing.
        log_prob: Whether the shards have densities.
        sensitivity: Whether the shards have sensitivities.
        denoise_dtype: The dtype of the networks in the denoising step; `None` for that of the flow.
        weights_sha256: Checksum of the exact weights; None in folders of format 4.
    """

    flow_sha256: str
    num: Annotated[int, msgspec.Meta(ge=1, le=MAX_SAMPLES)]
    shape: tuple[int, ...]
    seed: int
    labels_or_context_sha256: str | None
    num_classes: int
    classes: tuple[str, ...]
    batch_size: Count
    shard_size: Count
    files: Files
    dtype: str
    strategy: str
    strategy_sha256: str | None
    guidance: Guidance | None
    denoise: float
    tolerance: float | None
    certify: CertifyMode
    log_prob: bool
    sensitivity: bool
    denoise_dtype: DenoiseDtype = None
    weights_sha256: str | None = None

    @classmethod
    def of(
        cls, request: SamplingRequest, strategy: str, *, num: int, seed: int, batch_size: int, shard_size: int,
        files: Files,
    ) -> SampleSpec:  # fmt: skip
        """Returns the spec of the samples of a request, whose strategy has the name `strategy`."""
        flow, config = request.flow, request.flow.config
        solvers = None if isinstance(request.strategy, Auto) else request.strategy.to_json()
        return cls(
            num=num, shape=flow.image_shape or (config.num_tokens, config.token_dim), seed=seed,
            labels_or_context_sha256=labels_or_context_sha256(request.context), num_classes=config.num_classes,
            classes=tuple(flow.classes), batch_size=batch_size, shard_size=shard_size, files=files,
            flow_sha256=fingerprint(flow), weights_sha256=weights_sha256(flow), dtype=flow.precision, strategy=strategy,
            strategy_sha256=None if solvers is None else sha256(json_bytes(solvers)),
            guidance=flow.guidance, denoise=request.denoising.denoise, tolerance=request.strategy.tolerance,
            certify=request.options.certify, log_prob=request.log_prob, sensitivity=request.sensitivity,
            denoise_dtype=request.denoising.denoise_dtype,
        )  # fmt: skip

    def __post_init__(self) -> None:
        if self.num_shards > _MAX_SHARDS:
            message = f"{self.num_shards:,} shards; give a larger one, for at most {_MAX_SHARDS:,}"
            raise InputValueError(message, argument="shard_size", value=self.shard_size)

    @property
    def has_pictures(self) -> bool:
        """True if samples are grey or colour images, which are stored in 8 bits."""
        return len(self.shape) == 3 and self.shape[0] in PICTURE_CHANNELS

    @property
    def num_shards(self) -> int:
        """The number of shards."""
        return -(-self.num // self.shard_size)

    def span(self, index: int) -> range:
        """Returns the indices of the samples in a shard."""
        start = index * self.shard_size
        return range(start, min(start + self.shard_size, self.num))

    def unit(self, index: int) -> str:
        """Returns the name of a shard. That of a last shard with fewer samples has their number, since it may grow."""
        num = len(self.span(index))
        return f"shard-{index:05}" + f"-of-{num}" * (num < self.shard_size)

    def class_folder(self, label: int) -> str:
        """Returns the name of the folder of a class's PNGs: its number, and its name if it has one."""
        if label < 0:
            return "none"
        number = f"{label:0{len(str(self.num_classes - 1))}}"
        name = re.sub(r"\W+", "-", self.classes[label])[:_MAX_NAME_LENGTH] if self.classes else ""
        return f"{number}-{name}" if name not in ("", number) else number


def labels_or_context_sha256(context: Context) -> str | None:
    """Returns the SHA-256 of labels as little-endian int64, or of another context as float32."""
    values = context.values
    if values is None:
        return None
    return sha256(to_numpy(values).astype("<f4" if values.is_floating_point() else "<i8").tobytes())
