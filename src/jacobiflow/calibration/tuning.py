"""What a planner needs of a flow: a guess and a correction for each block, and the sweeps that these then take."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from jacobiflow.calibration.fit import fit_chord, fit_guess
from jacobiflow.files import tensor_from_json, tensor_to_json, write_json
from jacobiflow.flows.base import AffineBlock, LowPrecision
from jacobiflow.flows.fingerprint import check_fingerprint, fingerprint
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.guidance import Guidance, guided
from jacobiflow.latents import FIRST_CALIBRATION_LATENT, draw_latents
from jacobiflow.solvers import (
    CausalLinear,
    Chord,
    Correction,
    MaxSweeps,
    Plain,
    Sequential,
    Solution,
    Solver,
    Tolerance,
    Whole,
    Window,
    certify,
    solve,
)

SCHEMA_VERSION = 1
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
_SMALLEST_WINDOW = 8
_COARSE = (2, 3, 4, 5, 6)  # sweeps in bfloat16, whose rounding leaves nothing for more to find
_COARSE_TO_TOLERANCE = (2, 3, 4)
_FINE_AFTER_COARSE = (1, 2, 3, 4)
_FINE = (2, 3, 4, 5, 6, 7, 8)
_TYPICAL = 1e-3  # the tolerance at which corrections are compared, and errors followed through later blocks


@dataclass(frozen=True)
class Run:
    """One way to solve a block, tried on the samples of a tuning.

    **Attributes:** `window`, its size (T: all tokens); `tolerance`, at which its sweeps stopped; `sweeps`, of each
    sample, after `coarse` ones of all tokens in bfloat16; `residual` and `error`, the largest |g(x) - x| and |x - X*|
    of what came out.
    """

    window: int
    tolerance: float
    sweeps: tuple[int, ...]
    residual: float
    error: float
    coarse: int = 0

    def __post_init__(self) -> None:
        _check_count("window", self.window, 1)
        _check_count("coarse", self.coarse, 0)
        for count in self.sweeps:
            _check_count("sweeps", count, 0)


@dataclass(frozen=True)
class CountedRun:
    """As `Run`, all tokens being swept `coarse` times in bfloat16 and then `fine` times in full precision."""

    coarse: int
    fine: int
    residual: float
    error: float

    def __post_init__(self) -> None:
        _check_count("coarse", self.coarse, 0)
        _check_count("fine", self.fine, 1)
        for name in ("residual", "error"):
            if not isinstance(getattr(self, name), float):
                raise ValueError(f"tuning: {name} {getattr(self, name)!r}: give a number")


@dataclass(frozen=True)
class BlockTuning:
    """The `guess` and `correction` fitted to a block, what `runs` with them took, and its `amplification`.

    `counted` are runs of given numbers of sweeps, without coarse ones where the block has no bfloat16 network.
    Amplification is the largest error of an image over the largest error of the block's solution that caused it, all
    later blocks being solved exactly.
    """

    guess: CausalLinear
    correction: Correction
    runs: tuple[Run, ...]
    counted: tuple[CountedRun, ...]
    amplification: float


@dataclass(frozen=True)
class Tuning:
    """What `tune` found: a `BlockTuning` per block, in encoding order, and what it was made with.

    **Raises** `ValueError` where a block has no runs, or guesses are not (`num_tokens`, channels).
    """

    fingerprint: str
    num_tokens: int
    guidance: Guidance | None
    samples: int
    seed: int
    blocks: tuple[BlockTuning, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.fingerprint, str):
            raise ValueError(f"tuning: fingerprint {self.fingerprint!r}: give a text")
        for i, block in enumerate(self.blocks):
            if not block.runs or any(len(run.sweeps) != self.samples for run in block.runs):
                raise ValueError(f"tuning: block {i} lacks runs of {self.samples} samples")
            if len(block.guess.shift) != self.num_tokens:
                raise ValueError(f"tuning: the guess of block {i} is for {len(block.guess.shift)} tokens, not "
                                 f"{self.num_tokens}")  # fmt: skip
        if not self.blocks:
            raise ValueError("tuning: no blocks")

    def check(self, flow: nn.Module) -> None:
        """**Raises** `ValueError` where the tuning is of another flow."""
        check_fingerprint(self.fingerprint, flow, "the tuning is of")

    def to_json(self) -> dict[str, Any]:
        """A JSON value that `from_json` turns back into an equal tuning."""
        return {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": self.fingerprint,
            "num_tokens": self.num_tokens,
            "guidance": None if self.guidance is None else asdict(self.guidance),
            "samples": self.samples,
            "seed": self.seed,
            "blocks": [
                {
                    "kernel": tensor_to_json(block.guess.kernel),
                    "shift": tensor_to_json(block.guess.shift),
                    "chord": tensor_to_json(block.correction.kernel) if isinstance(block.correction, Chord) else None,
                    "amplification": block.amplification,
                    "runs": [asdict(run) for run in block.runs],
                    "counted": [asdict(run) for run in block.counted],
                }
                for block in self.blocks
            ],
        }

    @classmethod
    def from_json(cls, value: Any) -> Tuning:
        """Inverse of `to_json`. **Raises** `ValueError` where the value is none of its kind."""
        if not isinstance(value, dict) or value.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"not a tuning of schema_version {SCHEMA_VERSION}")
        try:
            guidance = value["guidance"]
            return cls(
                fingerprint=value["fingerprint"],
                num_tokens=value["num_tokens"],
                guidance=None if guidance is None else Guidance(**guidance),
                samples=value["samples"],
                seed=value["seed"],
                blocks=tuple(_block_from_json(block) for block in value["blocks"]),
            )
        except KeyError as error:
            raise ValueError(f"entry {error} is missing") from error
        except (TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"an entry is of the wrong kind ({error})") from error

    def save(self, path: str | Path) -> None:
        """Write as JSON; the file appears whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Tuning:
        """Read what `save` wrote. **Raises** `ValueError` where the file is missing or no tuning."""
        try:
            return cls.from_json(json.loads(Path(path).read_text()))
        except OSError as error:
            raise ValueError(f"tuning {path}: cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tuning {path}: {error}; make it anew with jacobiflow calibrate --chord") from error


def tune(
    flow: ImageFlow, labels: Int[Tensor, " n"] | None = None, guidance: Guidance | None = None, *, samples: int = 32,
    batch_size: int = 64, seed: int = 0, progress: bool = True,
) -> Tuning:  # fmt: skip
    """Fit a guess and a correction to every block, and count the sweeps that they take, on fresh latents.

    The latents go through the exact inverse, block by block. At each block a `CausalLinear` guess and a `Chord` are
    fitted to its solutions, and `Window`s of 8, 16, 32 .. tokens, and all tokens, are solved with them to each of
    `TOLERANCES`. A chord that does not save sweeps is left out.

    **Arguments:**

    - `labels`: classes, taken in turn; `None` takes all classes in turn, where the flow has any.
    - `guidance`: the guidance that is to be sampled with.
    - `samples`: how many latents; `batch_size` of them are in the network at a time.
    - `seed`: fixes them; they are none of those that `jacobiflow.sample` draws.

    **Raises** `ValueError` for settings that do not fit, and where a latent overflows in the exact inverse.
    """
    config, var = flow.config, flow.var
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: give a positive whole number")
    if samples < 2:
        raise ValueError(f"samples={samples}: give at least 2, to fit to")
    if guidance is not None and not isinstance(guidance, Guidance):
        raise ValueError(f"guidance={guidance!r}: give a Guidance, such as Guidance({guidance!r})")
    if labels is not None and (not isinstance(labels, Tensor) or not labels.numel()):
        raise ValueError(f"labels {labels!r}: give a tensor of one class or more")
    if labels is None and config.num_classes:
        labels = torch.arange(config.num_classes)
    if labels is not None:
        flow.check_labels(labels, len(labels))
        labels = labels.to(var.device)[torch.arange(samples, device=var.device) % len(labels)]
    dtype = torch.float64 if var.dtype == torch.float64 else torch.float32
    z = draw_latents(samples, config.num_tokens, config.token_channels, seed, FIRST_CALIBRATION_LATENT)
    tokens = z.to(var.device, dtype) * var.sqrt().to(dtype)

    console = Console(stderr=True)
    found: dict[int, tuple[CausalLinear, Correction, tuple[Run, ...], tuple[CountedRun, ...], float]] = {}
    followed: dict[int, Tensor] = {}  # tokens after the latest block, had block i been solved to a typical tolerance
    with Progress(console=console, disable=not (progress and console.is_terminal), transient=True) as bar:
        for i in bar.track(range(config.num_blocks - 1, -1, -1), description="tuning"):
            block, permutation = guided(flow.blocks[i], guidance), flow.blocks[i].permutation

            def exact(z: Tensor, block: AffineBlock = block) -> Tensor:
                return solve(block, z, Solver(Sequential()), labels, batch_size).x

            followed = {j: permutation(exact(permutation(rows))) for j, rows in followed.items()}
            z = permutation(tokens)
            x = exact(z)
            if not torch.isfinite(x).all():
                lost = int((~torch.isfinite(x).all(dim=(1, 2))).sum())
                raise ValueError(f"{lost} of {samples} fresh latents overflow in the exact inverse of block {i}; lower "
                                 "the guidance, or use a wider dtype")  # fmt: skip
            guess = fit_guess(x, z)
            correction = _best_correction(block, x, z, guess, labels, batch_size)
            runs, typical = _runs(block, x, z, guess, correction, labels, batch_size)
            counted = _counted_runs(block, x, z, guess, correction, labels, batch_size)
            found[i] = (guess, correction, runs, counted, float((typical - x).abs().max()))
            followed[i] = permutation(typical)
            tokens = permutation(x)
    return Tuning(
        fingerprint=fingerprint(flow),
        num_tokens=config.num_tokens,
        guidance=guidance,
        samples=samples,
        seed=seed,
        blocks=tuple(
            BlockTuning(*found[i][:4], _ratio(float((followed[i] - tokens).abs().max()), found[i][4]))
            for i in range(config.num_blocks)
        ),
    )


def _best_correction(
    block: AffineBlock, x: Tensor, z: Tensor, guess: CausalLinear, labels: Tensor | None, batch_size: int
) -> Correction:
    """The fitted chord, or `Plain` where that takes no more sweeps."""
    chord = fit_chord(block, x, z, guess, labels)
    plain, with_chord = (
        solve(block, z, Solver(Whole(), guess, Tolerance(_TYPICAL), correction), labels, batch_size).sample_sweeps
        for correction in (Plain(), chord)
    )
    return chord if with_chord.sum() < plain.sum() else Plain()


def _runs(
    block: AffineBlock, x: Tensor, z: Tensor, guess: CausalLinear, correction: Correction, labels: Tensor | None,
    batch_size: int,
) -> tuple[tuple[Run, ...], Float[Tensor, "b t c"]]:  # fmt: skip
    """What each window takes to each tolerance, and what all tokens at once give at the typical one.

    The larger windows are tried after sweeps in bfloat16 too, which save small ones little.
    """
    length, runs, typical = z.shape[1], [], x
    tried = [(window, 0) for window in window_sizes(length)]
    if isinstance(block, LowPrecision):
        tried += [(window, coarse) for window, _ in tried if 4 * window >= length for coarse in _COARSE_TO_TOLERANCE]
    for window, coarse in tried:
        for tolerance in TOLERANCES:
            solver = Solver(Window(window), guess, Tolerance(tolerance), correction, coarse)
            solution: Solution = solve(block, z, solver, labels, batch_size)
            residual = certify(block, z, solution.x, labels, batch_size).max()
            error = (solution.x - x).abs().max()
            sweeps = tuple((solution.sample_sweeps - coarse).tolist())
            runs.append(Run(window, tolerance, sweeps, float(residual), float(error), coarse))
            if (window, tolerance, coarse) == (length, _TYPICAL, 0):
                typical = solution.x
    return tuple(runs), typical


def _counted_runs(
    block: AffineBlock, x: Tensor, z: Tensor, guess: CausalLinear, correction: Correction, labels: Tensor | None,
    batch_size: int,
) -> tuple[CountedRun, ...]:  # fmt: skip
    """Those of the numbers of sweeps tried that come within the largest tolerance."""
    tried = [(0, fine) for fine in _FINE]
    if isinstance(block, LowPrecision):
        tried += [(coarse, fine) for coarse in _COARSE for fine in _FINE_AFTER_COARSE]
    found = []
    for coarse, fine in tried:
        solution = solve(block, z, Solver(Whole(), guess, MaxSweeps(fine), correction, coarse), labels, batch_size)
        residual = float(certify(block, z, solution.x, labels, batch_size).max())
        if residual <= max(TOLERANCES):
            found.append(CountedRun(coarse, fine, residual, float((solution.x - x).abs().max())))
    return tuple(found)


def window_sizes(length: int) -> list[int]:
    """8, 16, 32 .. below T, and T."""
    doublings = range(math.ceil(math.log2(max(length / _SMALLEST_WINDOW, 1))))
    return [*(_SMALLEST_WINDOW * 2**k for k in doublings), length]


def _check_count(name: str, value: object, least: int) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"tuning: {name} {value!r}: give a whole number, {least} or more")


def _ratio(error: float, cause: float) -> float:
    return error / cause if cause > 0 else 1.0


def _block_from_json(value: Mapping[str, Any]) -> BlockTuning:
    return BlockTuning(
        guess=CausalLinear(tensor_from_json(value["kernel"]), tensor_from_json(value["shift"])),
        correction=Plain() if value["chord"] is None else Chord(tensor_from_json(value["chord"])),
        runs=tuple(
            Run(
                run["window"], float(run["tolerance"]), tuple(run["sweeps"]), coarse=run.get("coarse", 0),
                **{name: math.inf if run[name] is None else float(run[name]) for name in ("residual", "error")},
            )
            for run in value["runs"]
        ),
        counted=tuple(CountedRun(**run) for run in value["counted"]),
        amplification=float(value["amplification"]),
    )  # fmt: skip
