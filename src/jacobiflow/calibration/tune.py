"""Fit a guess and a correction to every block, and count the sweeps that these then take."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from jacobiflow.calibration.kept import Kept
from jacobiflow.calibration.tuning import BlockTuning, CountedRun, Run, Tuning
from jacobiflow.checks import (
    check_count,
    check_fields,
    check_flag,
    check_kind,
    check_number,
    check_positive,
    check_seed,
    short,
)
from jacobiflow.codec import registered
from jacobiflow.errors import InputValueError
from jacobiflow.flows.base import AffineBlock, LowPrecision
from jacobiflow.flows.fingerprint import fingerprint
from jacobiflow.flows.image_flow import ImageFlow, check_flow
from jacobiflow.flows.labels import Labels, as_labels
from jacobiflow.guidance import Guidance, check_guidance, guided
from jacobiflow.inversion import invert, prior_tokens
from jacobiflow.latents import FIRST_CALIBRATION_LATENT, MOST_SAMPLES, draw_latents
from jacobiflow.solvers import (
    Correction,
    Given,
    Guess,
    Latent,
    MaxSweeps,
    Partition,
    Plain,
    Sequential,
    Solution,
    Solver,
    Tolerance,
    Whole,
    certify,
    solve,
)

SAMPLES = 16
"""Fresh latents that a tuning is of, by default."""


@dataclass(frozen=True)
class TuneSettings:
    """What `tune` tries at each block.

    **Attributes:**

    - `tolerances`: a planner chooses among them, and takes the geometric means of neighbours.
    - `typical`: the tolerance at which guesses and corrections are compared, and errors are followed to the image.
    - `fit`: whether guesses and corrections are fitted; otherwise every block has `Latent` and `Plain`.
    - `partitions`: those to try; `None` for the candidates of all that are registered.
    - `fine`: numbers of sweeps to try without a tolerance.
    - `coarse`: numbers of sweeps in bfloat16 to try; more of them change nothing but its rounding.
    - `fine_after_coarse`: numbers of sweeps to try after each of those.
    - `coarse_to_tolerance`: numbers of sweeps in bfloat16 to try before sweeps to each tolerance.
    - `coarse_from`: the least share of the tokens in a run for which these are tried; a small run gains little.
    - `coarse_share`: they are tried where they are at least this share of the passes that it takes without them.

    The defaults leave out what hardly a plan for a bundled model has. That halves the passes of a tuning, and makes no
    plan longer by more than a few per cent (docs/calibration.md).

    **Raises** `ValueError` where there is no tolerance or no partition.
    """

    tolerances: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    typical: float = 1e-3
    fit: bool = True
    partitions: tuple[Partition, ...] | None = None
    fine: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    coarse: tuple[int, ...] = (2, 3)
    fine_after_coarse: tuple[int, ...] = (2, 3, 4)
    coarse_to_tolerance: tuple[int, ...] = (2, 3)
    coarse_from: float = 0.25
    coarse_share: float = 0.1

    def __post_init__(self) -> None:
        check_fields(self)
        for tolerance in self.tolerances:
            check_positive("tolerances", tolerance)
        check_positive("typical", self.typical)
        for name in ("fine", "coarse", "fine_after_coarse", "coarse_to_tolerance"):
            for count in getattr(self, name):
                check_count(name, count)
        check_number("coarse_from", self.coarse_from)
        check_number("coarse_share", self.coarse_share)
        if not self.tolerances or self.partitions == ():
            raise InputValueError(
                "TuneSettings: give one tolerance and one partition or more; None tries all partitions"
            )


def tune(
    flow: ImageFlow, labels: Labels | None = None, guidance: Guidance | None = None, *,
    samples: int = SAMPLES, batch_size: int = 64, seed: int = 0, progress: bool = True,
    settings: TuneSettings = TuneSettings(), kept: Kept = Kept(),  # noqa: B008  frozen
) -> Tuning:  # fmt: skip
    """Fit a guess and a correction to every block, and count the sweeps that they take, on fresh latents.

    The latents go through the exact inverse, block by block. At each block the registered guesses and corrections that
    can be fitted are fitted to its solutions (`CausalLinear` and `Chord`), and the candidates of the registered
    partitions (`Window`s of 32, 64, 128 .. tokens, and of all) are solved with the best of them to each of a few
    tolerances. A correction that does not save sweeps is left out.

    **Arguments:**

    - `labels`: a class, or a tensor, list or array of classes, taken in turn; `None` takes all classes in turn, where
        the flow has any.
    - `guidance`: the guidance to sample with.
    - `samples`: how many latents; `batch_size` of them are in the network at a time.
    - `seed`: fixes them. `jacobiflow.sample` never draws the same ones.
    - `settings`: what is tried.
    - `kept`: blocks that an interrupted `calibrate` has tuned are taken from there.

    **Raises** `ValueError` for arguments that do not fit, `LatentOverflowError`, which is one, if a latent overflows in
    the exact inverse, and `TypeError` for other kinds of arguments.
    """
    labels, samples, batch_size = _checked(flow, labels, guidance, samples, batch_size)
    seed = check_seed(seed)
    check_flag("progress", progress)
    check_kind("settings", settings, TuneSettings, "TuneSettings")
    config = flow.config
    latents = draw_latents(samples, config.num_tokens, config.token_channels, seed, FIRST_CALIBRATION_LATENT)
    if labels is None and config.num_classes:
        labels = torch.arange(config.num_classes)
    if labels is not None:
        labels = labels.to(flow.var.device)[torch.arange(samples, device=flow.var.device) % len(labels)]
    console = Console(stderr=True)
    found: dict[int, _Tried] = {}
    with Progress(console=console, disable=not (progress and console.is_terminal), transient=True) as bar:
        task = bar.add_task("tuning", total=config.num_blocks)

        def solve_block(i: int, z: Float[Tensor, "r t c"]) -> Float[Tensor, "r t c"]:
            """The exact rows, then those that follow an earlier block's typical error, then this block's own."""
            block = guided(flow.blocks[i], guidance)
            repeated = None if labels is None else labels.repeat(len(z) // samples)
            x = solve(block, z, Solver(Sequential()), repeated, batch_size).x
            check_finite(x[:samples], f"fresh latents overflow in the exact inverse of block {i}")
            trials = _Trials(block, x[:samples], z[:samples], labels, batch_size, settings)
            found[i] = kept.once(f"block-{i}", _Tried, trials.run)
            bar.advance(task)
            return torch.cat((x, found[i].typical.to(x)))

        x = invert(flow, prior_tokens(flow, latents), solve_block)
    exact, *followed = x.split(samples)
    errors = {
        i: float((rows - exact).abs().max())
        for i, rows in zip(reversed(range(config.num_blocks)), followed, strict=True)
    }
    return Tuning(
        fingerprint=fingerprint(flow),
        num_tokens=config.num_tokens,
        guidance=guidance,
        samples=samples,
        seed=seed,
        blocks=tuple(found[i].tuning(errors[i]) for i in range(config.num_blocks)),
    )


class LatentOverflowError(InputValueError):
    """The exact inverse of a latent is not finite."""


def check_finite(x: Float[Tensor, "b t c"], what: str) -> None:
    """**Raises** `LatentOverflowError` that counts the samples in which an entry is not finite, named `what`."""
    lost = int((~torch.isfinite(x).all(dim=(1, 2))).sum())
    if lost:
        raise LatentOverflowError(f"{lost} of {len(x)} {what}; lower the guidance, or use a wider dtype")


def _checked(
    flow: ImageFlow, labels: Labels | None, guidance: Guidance | None, samples: int, batch_size: int
) -> tuple[Int[Tensor, " n"] | None, int, int]:
    check_flow(flow)
    samples = check_count("samples", samples, 2, MOST_SAMPLES)
    batch_size = check_count("batch_size", batch_size, most=MOST_SAMPLES)
    check_guidance(guidance)
    if labels is not None:
        classes = as_labels(labels, 1)
        if not len(classes):
            raise InputValueError(f"labels={short(labels)}: give one class or more")
        labels = flow.check_labels(classes, len(classes))
    return labels, samples, batch_size


@dataclass(frozen=True)
class _Tried:
    """What was tried at a block. `typical` is an answer to the typical tolerance, and `error` that of it."""

    guess: Guess
    correction: Correction
    runs: tuple[Run, ...]
    counted: tuple[CountedRun, ...]
    typical: Float[Tensor, "b t c"]
    error: float

    def tuning(self, image_error: float) -> BlockTuning:
        """The block's tuning, where the typical answer caused an error of `image_error`."""
        amplification = image_error / self.error if self.error > 0 else 1.0
        return BlockTuning(self.guess, self.correction, self.runs, self.counted, amplification)


@dataclass(frozen=True)
class _Trials:
    """A block with its solutions `x` at `z`, to try solvers on."""

    block: AffineBlock
    x: Float[Tensor, "b t c"]
    z: Float[Tensor, "b t c"]
    labels: Int[Tensor, " b"] | None
    batch_size: int
    settings: TuneSettings

    def run(self) -> _Tried:
        """Fit, and try all that the settings name."""
        guess = self._best_guess() if self.settings.fit else Latent()
        correction = self._best_correction(guess) if self.settings.fit else Plain()
        runs, typical = self._runs(guess, correction)
        counted = self._counted_runs(guess, correction)
        return _Tried(guess, correction, runs, counted, typical, self._error(typical))

    def _solve(self, solver: Solver) -> Solution:
        return solve(self.block, self.z, solver, self.labels, self.batch_size)

    def _sweeps(self, guess: Guess, correction: Correction) -> int:
        """Of all samples together, to the typical tolerance."""
        solver = Solver(Whole(), guess, Tolerance(self.settings.typical), correction)
        return int(self._solve(solver).sample_sweeps.sum())

    def _residual(self, x: Tensor) -> float:
        return float(certify(self.block, self.z, x, self.labels, self.batch_size).max())

    def _error(self, x: Tensor) -> float:
        return float((x - self.x).abs().max())

    def _best_guess(self) -> Guess:
        fitted = [guess for kind in registered(Guess).values() if (guess := kind.fit(self.x, self.z)) is not None]
        return fitted[0] if len(fitted) == 1 else min(fitted, key=lambda guess: self._sweeps(guess, Plain()))

    def _best_correction(self, guess: Guess) -> Correction:
        fitted = [kind.fit(self.block, self.x, self.z, guess, self.labels) for kind in registered(Correction).values()]
        candidates = [Plain(), *(correction for correction in fitted if correction is not None)]
        return min(candidates, key=lambda correction: self._sweeps(guess, correction))

    def _runs(self, guess: Guess, correction: Correction) -> tuple[tuple[Run, ...], Float[Tensor, "b t c"]]:
        """What each partition takes to each tolerance; and what all tokens at once give at the typical one."""
        settings, length, runs = self.settings, self.z.shape[1], []
        partitions = settings.partitions
        if partitions is None:
            partitions = tuple(p for kind in registered(Partition).values() for p in kind.candidates(length))
        for partition in partitions:
            passes, share = dict[float, float](), partition.stop(0, length) / length
            for tolerance in settings.tolerances:
                runs.append(self._run(partition, tolerance, guess, correction))
                passes[tolerance] = share * statistics.mean(runs[-1].sweeps)
            sweeps = not partition.token_by_token(length)
            if sweeps and isinstance(self.block, LowPrecision) and share >= settings.coarse_from:
                for coarse, tolerance in product(settings.coarse_to_tolerance, settings.tolerances):
                    if coarse >= settings.coarse_share * passes[tolerance]:
                        runs.append(self._run(partition, tolerance, guess, correction, coarse))
        typical = self._solve(Solver(Whole(), guess, Tolerance(settings.typical), correction)).x
        return tuple(runs), typical

    def _run(
        self, partition: Partition, tolerance: float, guess: Guess, correction: Correction, coarse: int = 0
    ) -> Run:
        """What a partition takes to a tolerance, after so many sweeps in bfloat16."""
        solution = self._solve(Solver(partition, guess, Tolerance(tolerance), correction, coarse))
        sweeps = tuple((solution.sample_sweeps - coarse).tolist())
        return Run(partition, tolerance, sweeps, self._residual(solution.x), self._error(solution.x), coarse)

    def _counted_runs(self, guess: Guess, correction: Correction) -> tuple[CountedRun, ...]:
        """Those of the numbers of sweeps tried that come within the largest tolerance.

        More sweeps go on from fewer. Where these overflowed they begin anew: a longer run may recover.
        """
        settings, found = self.settings, []
        tried = {0: settings.fine}
        if isinstance(self.block, LowPrecision):
            tried |= dict.fromkeys(settings.coarse, settings.fine_after_coarse)
        for coarse, counts in tried.items():
            start, done = guess, 0
            for fine in sorted(counts):
                solver = Solver(Whole(), start, MaxSweeps(fine - done), correction, 0 if done else coarse)
                x = self._solve(solver).x
                if torch.isfinite(x).all():
                    start, done = Given(x), fine
                residual = self._residual(x)
                if residual <= max(settings.tolerances):
                    found.append(CountedRun(coarse, fine, residual, self._error(x)))
        return tuple(found)
