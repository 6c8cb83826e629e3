"""What is compared: rows of samples of one flow, at the same latents."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from jacobiflow.baselines import GRIDS, PEERS, original_loop
from jacobiflow.calibration import Report
from jacobiflow.denoising import check_rate
from jacobiflow.errors import InputValueError
from jacobiflow.files import json_bytes, sha256
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.guidance import Guidance
from jacobiflow.sampling import sample
from jacobiflow.strategy import Strategy, choose, is_auto

ORIGINAL = "Original"


@dataclass(frozen=True)
class Experiment:
    """Rows to compare, and the folder `out` for their samples.

    A row is named "Original", the loop of the flow's original code; as a strategy, see `jacobiflow.strategy.choose`; or
    as one of `jacobiflow.baselines.PEERS`, which is run at its published setting. Rows of "auto" are certified, all
    others are drawn as their authors do. The images of "Original" are drawn by this library's sequential loop: both are
    exact, and differ by rounding.

    **Attributes:** `labels` of as many samples as the largest row has; `report`: strategies take their guesses from it,
    and "auto" is planned by it; `batch_size` of timing and drawing; `shard_size`: samples that an interrupted run
    loses; `model`, a name for the manifests.

    **Raises** `ValueError` for a row that is given twice, and for what does not fit the flow.
    """

    flow: ImageFlow
    out: Path
    names: tuple[str, ...]
    labels: Int[Tensor, " n"] | None = None
    seed: int = 0
    guidance: Guidance | None = None
    denoise: float = 0.0
    report: Report | None = None
    batch_size: int = 16
    shard_size: int = 512
    model: str = ""

    def __post_init__(self) -> None:
        slugs = [slug(name) for name in self.names]
        for name in self.names:
            if slugs.count(slug(name)) > 1:
                raise InputValueError(f"row {name!r}: given twice; give each row once")
            if not is_auto(name):
                self.strategy(name)
        if self.labels is not None:
            object.__setattr__(self, "labels", self.flow.check_labels(self.labels, len(self.labels)))
        check_rate(self.flow, self.denoise)

    def strategy(self, name: str) -> Strategy | None:
        """The strategy of a row, "auto" as `begin` has planned it; `None` for the original loop and for a peer."""
        if name == ORIGINAL or name in PEERS:
            return None
        found = Strategy.load(self.plan_file(name)) if is_auto(name) else self.choose(name)
        return replace(found, prediction=None)

    def choose(self, name: str) -> Strategy:
        """`jacobiflow.strategy.choose` for the flow, batch size, guidance and report of the experiment."""
        return choose(self.flow, name, self.batch_size, guidance=self.guidance, report=self.report)

    def digest(self, name: str) -> str | None:
        """SHA-256 of a row's strategy; `None` where it has none."""
        strategy = self.strategy(name)
        return None if strategy is None else sha256(json_bytes(strategy.to_json()))

    def sampler(self, name: str) -> Callable[[Tensor, Tensor | None], Any]:
        """What draws a batch of a row from latents and labels: images, or an object with `images`; not denoised."""
        flow, guidance, strategy = self.flow, self.guidance, self.strategy(name)
        if strategy is not None:
            return lambda z, labels: sample(
                flow, latents=z, labels=labels, strategy=strategy, guidance=guidance, certify=is_auto(name),
                progress=False,
            )  # fmt: skip
        if name in PEERS:
            peer, setting = PEERS[name], GRIDS[name][0]
            return lambda z, labels: peer(flow, z, labels, guidance, **setting)
        _, loop = original_loop(flow)
        return lambda z, labels: loop(flow, z, labels, guidance)

    def first_labels(self, num: int, path: Path) -> Int[Tensor, " n"] | None:
        """The labels of the `num` samples in the folder `path`. **Raises** `ValueError` where there are fewer."""
        if self.labels is not None and len(self.labels) < num:
            raise InputValueError(
                f"{path}: is of {num:,} samples, labels are given for {len(self.labels):,}; give them all"
            )
        return None if self.labels is None else self.labels[:num]

    def row_folder(self, name: str) -> Path:
        """The folder of a row's samples."""
        return self.out / "rows" / slug(name)

    def plan_file(self, name: str) -> Path:
        """The file of a row of "auto": its plan is made by timings, so it is made once and kept."""
        return self.out / "plans" / f"{slug(name)}.json"

    def exact_file(self, start: int) -> Path:
        """The file of the exact images of a shard, from its first sample's index."""
        return self.out / "exact" / f"{start:08}.npy"


def slug(name: str) -> str:
    """The name of a row as part of a path."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
