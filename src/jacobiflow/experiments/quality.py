"""Strategies side by side, as in the paper's Tables 3 and 4: quality of many samples, and time."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from jacobiflow.baselines.peers import GRIDS, PEERS
from jacobiflow.calibration import Report
from jacobiflow.denoising import check_rate, denoise
from jacobiflow.evaluation.distances import Statistics, frechet_distance
from jacobiflow.evaluation.features import extract
from jacobiflow.evaluation.fidelity import PixelDifference, pixel_difference
from jacobiflow.experiments.speed import SEQUENTIAL, original_loop
from jacobiflow.files import json_bytes, sha256, write_atomically, write_json
from jacobiflow.flows.fingerprint import fingerprint
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.guidance import Guidance
from jacobiflow.latents import draw_latents
from jacobiflow.measuring import Timing, interleave, machine, paired_error
from jacobiflow.sampling import sample
from jacobiflow.solvers import Tolerance
from jacobiflow.storage import (
    MANIFEST,
    Draw,
    Drawn,
    Manifest,
    Processes,
    SampleFolder,
    draw_by_strategy,
    generate,
    labels_sha256,
)
from jacobiflow.strategy import Strategy, choose, is_auto
from jacobiflow.strategy.notation import DEFAULT_TOLERANCE

ORIGINAL, AUTO = "Original", "auto"
FIGURES = ("comparison.json", "comparison.png")
WITHIN = 0.01  # of the original's distance, which the paper prints bold
_PLANS, _ROWS, _EXACT, _TIMINGS, _SETTINGS = "plans", "rows", "exact", "timings.json", "settings.json"


@dataclass(frozen=True)
class Row:
    """One strategy of a comparison.

    **Attributes:** `name`; `num` samples; `distance`, Fréchet, to the real images; `relative`, by what share that is
    above the original's over the same latents (below 0: nearer); `max` and `rms`, the largest and the root-mean-square
    difference of an entry to the exact images; `pixels`, a `PixelDifference`; `resolved`, the share solved again
    sequentially; `seconds`, a `Timing` of one batch, without denoising; `rate`, how many times as fast as the original.
    """

    name: str
    num: int
    distance: float
    relative: float
    max: float
    rms: float
    pixels: PixelDifference
    resolved: float
    seconds: Timing
    rate: float

    @property
    def within(self) -> bool:
        """Whether the distance is at most 1% above the original's."""
        return self.relative <= WITHIN


@dataclass(frozen=True)
class Comparing:
    """A comparison in the folder `out`, which is gone on with where it was stopped.

    Rows are named "Original", the loop of the flow's original code; a strategy (see `Strategy.parse`); "auto", or
    "auto:1e-2" for a tolerance; or a sampler of `jacobiflow.baselines.peers`, at its published setting. "auto" is
    certified, all others are as their authors have them. The images of "Original" are drawn by this library's
    sequential loop: both are exact, and differ by rounding.

    **Attributes:** `labels` of as many samples as the largest row has; `report`: where strategies take their guesses
    from, and "auto" is planned from; `batch_size` of timing and drawing; `shard_size`, what an interrupted run loses.
    """

    flow: ImageFlow
    out: Path
    names: tuple[str, ...]
    labels: Int[Tensor, " n"] | None
    seed: int = 0
    guidance: Guidance | None = None
    denoise: float = 0.0
    report: Report | None = None
    batch_size: int = 16
    shard_size: int = 512
    model: str = ""

    def __post_init__(self) -> None:
        slugs = [_slug(name) for name in self.names]
        for name, slug in zip(self.names, slugs, strict=True):
            if slugs.count(slug) > 1:
                raise ValueError(f"row {name!r}: given twice; give each row once")
            self._sampler(name)
        if self.labels is not None:
            self.flow.check_labels(self.labels, len(self.labels))
        check_rate(self.flow, self.denoise)

    # ------------------------------------------------------------------------------------------------------- samplers

    def _sampler(self, name: str) -> str:
        """What draws a row: "original", "peer" or "strategy". **Raises** `ValueError` for a name that is none."""
        if name == ORIGINAL:
            original_loop(self.flow)
            return "original"
        if name in PEERS:
            return "peer"
        if is_auto(name):
            Tolerance(_tolerance(name) or DEFAULT_TOLERANCE)
        elif name != SEQUENTIAL:
            self._plan(name)
        return "strategy"

    def _plan(self, name: str) -> Strategy:
        """The strategy of a row. "auto" is planned by timings, so its plan is made once and kept in the folder."""
        chosen = partial(choose, self.flow, name, self.batch_size, guidance=self.guidance, report=self.report)
        if not is_auto(name):
            return replace(chosen(), prediction=None)
        path = self.out / _PLANS / f"{_slug(name)}.json"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            chosen().save(path)
        return replace(Strategy.load(path), prediction=None)

    def _digest(self, name: str) -> str | None:
        """SHA-256 of a row's strategy; `None` where it is drawn by no strategy."""
        if self._sampler(name) != "strategy":
            return None
        return sha256(json_bytes(self._plan(name).to_json()))

    def _run(self, name: str) -> Callable[[Tensor, Tensor | None], Any]:
        """What is timed of a row: a batch from its latents and labels to its images, not denoised."""
        kind = self._sampler(name)
        if kind == "original":
            _, loop = original_loop(self.flow)
            return lambda z, labels: loop(self.flow, z, labels, self.guidance)
        if kind == "peer":
            return lambda z, labels: PEERS[name](self.flow, z, labels, self.guidance, **GRIDS[name][0])
        made = self._plan(name)
        return lambda z, labels: sample(
            self.flow, latents=z, labels=labels, strategy=made, guidance=self.guidance, certify=is_auto(name),
            progress=False,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------------ the folder

    def begin(self, overwrite: bool = False) -> None:
        """Make the folder, or see that what it holds was begun with the same settings.

        **Raises** `ValueError` that names a setting that differs.
        """
        settings = {
            "fingerprint": fingerprint(self.flow), "dtype": str(self.flow.var.dtype), "seed": self.seed,
            "guidance": None if self.guidance is None else asdict(self.guidance), "denoise": float(self.denoise),
            "batch_size": self.batch_size, "shard_size": self.shard_size,
            "report": None if self.report is None else sha256(json_bytes(self.report.to_json())),
        }  # fmt: skip
        path, manifests = self.out / _SETTINGS, list((self.out / _ROWS).glob(f"*/{MANIFEST}"))
        if overwrite and (path.is_file() or manifests):
            for name in (_SETTINGS, _TIMINGS, *FIGURES):
                (self.out / name).unlink(missing_ok=True)
            for name in (_PLANS, _ROWS, _EXACT):
                shutil.rmtree(self.out / name, ignore_errors=True)
            manifests = []
        if path.is_file():
            held = _read_json(path)
            if held is None:
                raise ValueError(f"{path}: broken; restore it, or begin anew with --overwrite")
            for name, value in settings.items():
                if held.get(name) != value:
                    raise ValueError(
                        f"{self.out}: holds a comparison of {name} {held.get(name)}, not {value}; give another --out, "
                        "or --overwrite to lose it"
                    )
        elif manifests:
            raise ValueError(f"{self.out}: has rows but no {_SETTINGS}; restore it, or begin anew with --overwrite")
        for row in (manifest.parent for manifest in manifests):
            manifest = SampleFolder.open(row).manifest
            self._check_labels(manifest.num, row)
            held_labels = None if self.labels is None else self.labels[: manifest.num]
            if labels_sha256(held_labels) != manifest.labels_sha256:
                raise ValueError(f"{row}: holds samples of other labels; give another --out, or --overwrite")
        if path.is_file():
            return
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)

    def _check_labels(self, num: int, path: Path) -> None:
        if self.labels is not None and len(self.labels) < num:
            raise ValueError(f"{path}: holds a run of {num:,} samples; give --final {num}")

    def _first_labels(self) -> Tensor | None:
        """Those of the batch that is timed, repeated where there are fewer."""
        if self.labels is None:
            return None
        return self.labels[torch.arange(self.batch_size) % len(self.labels)]

    # --------------------------------------------------------------------------------------------------------- timing

    def timings(self, repeats: int, after_each: Callable[[str], None] | None = None) -> dict[str, Any]:
        """Seconds of a batch of every row, all in turn, and errors of that batch; kept in the folder.

        **Returns** a JSON value: `rows`, a `Timing` and the largest `error` by name; `denoise_seconds` of a batch,
        which all rows have in common; and what they were measured on. Rows are timed anew where one has not been, and
        on another machine.
        """
        config, device, first = self.flow.config, self.flow.var.device, self._first_labels()
        path = self.out / _TIMINGS
        here = {"machine": machine(device), "repeats": repeats, "labels_sha256": labels_sha256(first)}
        kept = _read_json(path)
        if kept is not None and _same_timing(kept, here, {name: self._digest(name) for name in self.names}):
            return kept
        z = draw_latents(self.batch_size, config.num_tokens, config.token_channels, self.seed)
        labels = None if first is None else first.to(device)
        z = z.to(self.flow.var)
        runs = {
            name: partial(self._run(name), z, labels) for name in dict.fromkeys((*self.names, ORIGINAL, SEQUENTIAL))
        }
        seconds, results = interleave(runs, repeats, device, after_each)
        exact = results[SEQUENTIAL].images
        started = time.perf_counter()
        if self.denoise:
            denoise(self.flow, exact, labels, self.denoise)
        found = {
            **here, "batch_size": self.batch_size,
            "denoise_seconds": time.perf_counter() - started,
            "rows": {
                name: asdict(seconds[name])
                | {"strategy_sha256": self._digest(name)}
                | {"error": paired_error(getattr(results[name], "images", results[name]), exact).max}
                for name in runs
            },
        }  # fmt: skip
        write_json(path, found)
        return found

    # -------------------------------------------------------------------------------------------------------- drawing

    def draw(self, name: str, num: int, among: Processes, progress: bool = True) -> SampleFolder:
        """`num` samples of a row, or as many as its folder has begun, each compared with the exact image of its latent.

        **Raises** `ValueError` where it has begun more than there are labels for.
        """
        kind = self._sampler(name)
        if kind == "original":
            return self.draw(SEQUENTIAL, num, among, progress)
        config, path = self.flow.config, self.out / _ROWS / _slug(name)
        num = max(num, SampleFolder.open(path).manifest.num) if (path / MANIFEST).is_file() else num
        self._check_labels(num, path)
        labels = None if self.labels is None else self.labels[:num]
        folder = SampleFolder(
            path,
            Manifest.of(
                self.flow, num, labels, self.seed, batch_size=self.batch_size, shard_size=self.shard_size,
                model=self.model, strategy=name, guidance=self.guidance, denoise=self.denoise,
                certify=kind == "strategy" and is_auto(name),
            ),
        )  # fmt: skip

        def drawing(folder: SampleFolder) -> Draw:
            by_strategy = partial(self._by_strategy, certify=is_auto(name))
            inner = self._by_peer(name) if kind == "peer" else by_strategy(folder.strategy())
            return partial(self._beside_exact, inner, name == SEQUENTIAL)

        made = None if kind == "peer" else partial(self._plan, name)
        shape = (config.num_tokens, config.token_channels)
        return generate(folder, labels, drawing, shape, made, progress=progress, among=among)

    def _by_strategy(self, strategy: str | Strategy, certify: bool) -> Draw:
        return draw_by_strategy(self.flow, strategy, self.guidance, self.denoise, certify, self.batch_size)

    def _by_peer(self, name: str) -> Draw:
        run = self._run(name)

        def draw(start: int, latents: Tensor, labels: Tensor | None, told: Callable[[float], None]) -> Drawn:
            z = latents.to(self.flow.var)
            classes = None if labels is None else labels.to(z.device)
            found = []
            for first in range(0, len(z), self.batch_size):
                span = slice(first, first + self.batch_size)
                found.append(run(z[span], None if classes is None else classes[span]).images)
                told(min(first + self.batch_size, len(z)) / len(z))
            images = torch.cat(found)
            if self.denoise:
                images = denoise(self.flow, images, classes, self.denoise)
            return Drawn(images, None, torch.zeros(len(z), dtype=torch.bool), {})

        return draw

    def _beside_exact(
        self, inner: Draw, is_exact: bool, start: int, latents: Tensor, labels: Tensor | None,
        told: Callable[[float], None],
    ) -> Drawn:  # fmt: skip
        """A shard, its error against the exact one, which is kept as it is, not rounded to 8 bits."""
        drawn = inner(start, latents, labels, told)
        path = self.out / _EXACT / f"{start:08}.npy"
        exact = None if is_exact else _read(path)
        if exact is None or len(exact) < len(latents):
            one = drawn if is_exact else self._by_strategy(SEQUENTIAL, False)(start, latents, labels, told)
            exact = one.images.cpu()
            path.parent.mkdir(parents=True, exist_ok=True)
            data = io.BytesIO()
            np.save(data, exact.numpy())
            write_atomically(path, data.getvalue())
        errors = [paired_error(*pair) for pair in zip(drawn.images.cpu(), exact[: len(latents)], strict=True)]
        return replace(drawn, figures={**drawn.figures, "errors": [(error.max, error.rms) for error in errors]})

    # -------------------------------------------------------------------------------------------------------- scoring

    def rows(
        self, folders: Mapping[str, SampleFolder], num: int, features: nn.Module, real: Statistics,
        timings: Mapping[str, Any],
    ) -> list[Row]:  # fmt: skip
        """The rows of the first `num` samples of each folder."""
        exact = folders[ORIGINAL]
        pixels = torch.cat(list(exact.batches()))[:num]
        base = frechet_distance(real, Statistics.of(extract(features, [pixels])))
        seconds = {
            name: Timing(**{key: t[key] for key in ("median", "min", "max")}) for name, t in timings["rows"].items()
        }
        rows = []
        for name, folder in folders.items():
            images = torch.cat(list(folder.batches()))[:num]
            distance = frechet_distance(real, Statistics.of(extract(features, [images])))
            errors = [
                [math.inf if value is None else value for value in error]  # JSON has no infinity
                for record in folder.records()
                for error in record.figures["errors"]
            ][:num]
            rows.append(
                Row(
                    name, len(images), distance, distance / base - 1, max(largest for largest, _ in errors),
                    math.sqrt(sum(rms * rms for _, rms in errors) / len(errors)),
                    pixel_difference(images, pixels), float(folder.resolved()[:num].double().mean()), seconds[name],
                    seconds[ORIGINAL].median / seconds[name].median,
                )
            )  # fmt: skip
        return rows


def finalists(rows: Sequence[Row]) -> list[str]:
    """The original, and the fastest within 1% of it among the other rows and among those of "auto"."""
    close = sorted((row for row in rows if row.within and row.name != ORIGINAL), key=lambda row: -row.rate)
    best = [next((row.name for row in close if is_auto(row.name) == planned), None) for planned in (False, True)]
    return [ORIGINAL, *(name for name in best if name is not None)]


def _read(path: Path) -> Tensor | None:
    """Images that `numpy.save` wrote; `None` where they are not there as a whole."""
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError):
        return None


def _same_timing(kept: Mapping[str, Any], here: Mapping[str, Any], strategies: Mapping[str, str | None]) -> bool:
    """Whether kept timings are of these rows, on this machine; drawing may go on with other threads."""
    try:
        timed = {name: row["strategy_sha256"] for name, row in kept["rows"].items()}
        return (
            all(kept["machine"][name] == here["machine"][name] for name in ("processor", "device", "torch"))
            and all(kept[name] == here[name] for name in ("repeats", "labels_sha256"))
            and timed.items() >= strategies.items()
        )
    except (AttributeError, KeyError, TypeError):
        return False


def _read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; `None` where there is none."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _tolerance(name: str) -> float | None:
    """The tolerance in "auto:1e-2"; `None` where none is given. **Raises** `ValueError` where it is no number."""
    _, colon, text = name.partition(":")
    try:
        return float(text) if colon else None
    except ValueError as error:
        raise ValueError(f"row {name!r}: give auto, or auto:TOLERANCE such as auto:1e-2") from error


def _slug(name: str) -> str:
    """The name of a row's folder."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
