"""What a planner needs of a flow, as data: a guess and a correction for each block, and the sweeps that they take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jacobiflow import codec
from jacobiflow.checks import check_count, check_fields, check_path, check_positive, check_seed
from jacobiflow.errors import InputError, InputValueError
from jacobiflow.files import write_json
from jacobiflow.flows.fingerprint import check_fingerprint
from jacobiflow.flows.image_flow import ImageFlow, check_flow
from jacobiflow.guidance import Guidance
from jacobiflow.solvers import Correction, Guess, Partition

SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Run:
    """One way to solve a block, tried on the samples of a tuning.

    **Attributes:** `partition`; `tolerance`, at which its sweeps stopped; `sweeps`, of each sample, after `coarse` ones
    of all tokens in bfloat16; `residual` and `error`, the largest |g(x) - x| and |x - X*| of the answers.
    """

    partition: Partition
    tolerance: float
    sweeps: tuple[int, ...]
    residual: float
    error: float
    coarse: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        check_positive("tolerance", self.tolerance)
        check_count("coarse", self.coarse, 0)
        for count in self.sweeps:
            check_count("sweeps", count, 0)
        _check_errors(self.residual, self.error)


@dataclass(frozen=True)
class CountedRun:
    """As `Run`, all tokens being swept `coarse` times in bfloat16 and then `fine` times in full precision."""

    coarse: int
    fine: int
    residual: float
    error: float

    def __post_init__(self) -> None:
        check_fields(self)
        check_count("coarse", self.coarse, 0)
        check_count("fine", self.fine)
        _check_errors(self.residual, self.error)


def _check_errors(residual: float, error: float) -> None:
    """Both may be infinite, and the error NaN, where an answer overflows."""
    if residual < 0 or error < 0:
        raise InputValueError(f"residual={residual}, error={error}: give 0 or positive numbers")


@dataclass(frozen=True)
class BlockTuning:
    """The `guess` and `correction` fitted to a block, what `runs` with them took, and its `amplification`.

    `counted` are runs of given numbers of sweeps, without coarse ones where the block has no bfloat16 network.
    Amplification is the largest error of the final tokens over the largest error of this block's solution that caused
    it, all later blocks being solved exactly.
    """

    guess: Guess
    correction: Correction
    runs: tuple[Run, ...]
    counted: tuple[CountedRun, ...]
    amplification: float

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.runs:
            raise InputValueError("tuning of a block: no runs; give one or more")
        if self.amplification < 0:
            raise InputValueError(f"amplification={self.amplification}: give 0 or a positive number")

    def check(self, num_tokens: int, token_channels: int) -> None:
        """**Raises** `ValueError` where a piece does not fit tokens (T, C)."""
        self.guess.check(num_tokens, token_channels)
        self.correction.check(token_channels)
        for run in self.runs:
            run.partition.check(num_tokens)


@dataclass(frozen=True)
class Tuning:
    """What `tune` found: a `BlockTuning` per block, in encoding order, and what it was made with.

    **Raises** `TypeError` for other kinds of values, `ValueError` where there is no block, a block has no runs, or a
    run has not a count for each sample.
    """

    fingerprint: str
    num_tokens: int
    guidance: Guidance | None
    samples: int
    seed: int
    blocks: tuple[BlockTuning, ...]

    def __post_init__(self) -> None:
        check_fields(self)
        check_count("num_tokens", self.num_tokens)
        check_count("samples", self.samples)
        check_seed(self.seed)
        if not self.blocks:
            raise InputValueError("tuning: no blocks")
        for i, block in enumerate(self.blocks):
            if any(len(run.sweeps) != self.samples for run in block.runs):
                raise InputValueError(f"tuning: block {i} lacks runs of {self.samples} samples")

    def check(self, flow: ImageFlow) -> None:
        """**Raises** `ValueError` where the tuning is of another flow, or does not fit its blocks and tokens."""
        check_flow(flow)
        check_fingerprint(self.fingerprint, flow, "the tuning is of")
        self.check_sizes(flow.config.num_blocks, flow.config.num_tokens, flow.config.token_channels)

    def check_sizes(self, num_blocks: int, num_tokens: int, token_channels: int) -> None:
        """**Raises** `ValueError` where the tuning does not fit so many blocks over tokens (T, C)."""
        have, want = (f"{len(self.blocks)} blocks of {self.num_tokens} tokens", f"{num_blocks} of {num_tokens}")
        if (len(self.blocks), self.num_tokens) != (num_blocks, num_tokens):
            raise InputValueError(f"tuning of {have}, but the flow has {want}")
        for i, block in enumerate(self.blocks):
            try:
                block.check(num_tokens, token_channels)
            except InputError as error:
                raise InputValueError(f"tuning, block {i}: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """A JSON value that `from_json` turns back into an equal tuning."""
        return {"schema_version": SCHEMA_VERSION, **codec.encode(self)}

    @classmethod
    def from_json(cls, value: Any) -> Tuning:
        """Inverse of `to_json`, and of its version 1. **Raises** `ValueError` that names the entry at fault."""
        version = value.get("schema_version") if isinstance(value, dict) else None
        if version not in (1, SCHEMA_VERSION):
            raise InputValueError(f"not a tuning of schema_version {SCHEMA_VERSION}")
        entries = {name: entry for name, entry in value.items() if name != "schema_version"}
        if version == 1:
            try:
                entries["blocks"] = [_from_version_1(block) for block in entries["blocks"]]
            except (KeyError, TypeError, AttributeError) as error:
                raise InputValueError(
                    f"tuning of schema_version 1: an entry is missing or of the wrong kind ({error})"
                ) from error
        return codec.decode(cls, entries)

    def save(self, path: str | Path) -> None:
        """Write as JSON, on one line; the file appears whole or not at all."""
        check_path("path", path)
        write_json(path, self.to_json(), indent=None)

    @classmethod
    def load(cls, path: str | Path) -> Tuning:
        """Read what `save` wrote. **Raises** `ValueError` where the file is missing or no tuning."""
        return codec.load(path, "tuning", cls.from_json, remedy="; make it anew with calibrate(..., chord=True)")


def _from_version_1(block: dict[str, Any]) -> dict[str, Any]:
    """A block of the first format, which had windows, and a causal linear guess with a chord or without, only."""
    chord = block["chord"]
    return {
        "guess": {"kind": "causal_linear", "kernel": block["kernel"], "shift": block["shift"]},
        "correction": {"kind": "plain"} if chord is None else {"kind": "chord", "kernel": chord},
        "runs": [
            {name: entry for name, entry in run.items() if name != "window"}
            | {"partition": {"kind": "window", "size": run["window"]}}
            for run in block["runs"]
        ],
        "counted": block["counted"],
        "amplification": block["amplification"],
    }
