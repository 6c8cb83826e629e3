"""A strategy: one solver per block, as data."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jacobiflow.files import write_json
from jacobiflow.solvers import (
    Latent,
    Plain,
    Segments,
    Sequential,
    Solver,
    Stopping,
    Tolerance,
    Whole,
    Window,
    Zeros,
)

FORMAT_VERSION = 1
_PARTITIONS: Mapping[str, Callable[..., Any]] = {
    "sequential": Sequential, "whole": Whole, "segments": Segments, "window": Window,
}  # fmt: skip
_GUESSES: Mapping[str, Callable[..., Any]] = {"latent": Latent, "zeros": Zeros}
_CORRECTIONS: Mapping[str, Callable[..., Any]] = {"plain": Plain}


@dataclass(frozen=True)
class Strategy:
    """One `Solver` per block, in encoding order: entry 0 is for the block that touches the image."""

    solvers: tuple[Solver, ...]

    @classmethod
    def uniform(cls, solver: Solver, num_blocks: int) -> Strategy:
        """The same solver for every block."""
        return cls((solver,) * num_blocks)

    def with_tolerance(self, atol: float) -> Strategy:
        """This strategy with `atol` in place of every tolerance that it has; sweep counts stay."""
        Tolerance(atol)  # refuses what is no tolerance
        return Strategy(
            tuple(
                s if s.stopping.atol is None else replace(s, stopping=replace(s.stopping, atol=atol))
                for s in self.solvers
            )
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON value that `from_json` turns back into an equal strategy."""
        return {
            "format_version": FORMAT_VERSION,
            "blocks": [
                {
                    "partition": _name(_PARTITIONS, s.partition),
                    "guess": _name(_GUESSES, s.guess),
                    "correction": _name(_CORRECTIONS, s.correction),
                    "stopping": asdict(s.stopping),
                }
                for s in self.solvers
            ],
        }

    @classmethod
    def from_json(cls, value: Any) -> Strategy:
        """Inverse of `to_json`. **Raises** `ValueError` that names the block and the entry at fault."""
        if not isinstance(value, dict) or value.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"strategy: not a JSON object with format_version {FORMAT_VERSION}")
        blocks = value.get("blocks")
        if not isinstance(blocks, list) or not blocks:
            raise ValueError("strategy: 'blocks' must list one solver per block")
        return cls(tuple(_solver(block, i) for i, block in enumerate(blocks)))

    def save(self, path: str | Path) -> None:
        """Write as JSON; the file appears whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Strategy:
        """Read what `save` wrote. **Raises** `ValueError` where the file is missing or not a strategy."""
        try:
            return cls.from_json(json.loads(Path(path).read_text()))
        except OSError as error:
            raise ValueError(f"strategy {path}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise ValueError(f"strategy {path}: {error}") from error


def _name(kinds: Mapping[str, Callable[..., Any]], piece: Any) -> dict[str, Any]:
    for name, kind in kinds.items():
        if type(piece) is kind:
            return {"kind": name, **asdict(piece)}
    raise ValueError(f"strategy: {piece!r} has no JSON form (known: {', '.join(kinds)})")


def _solver(block: Any, index: int) -> Solver:
    where = f"block {index}"
    if not isinstance(block, dict) or set(block) != {"partition", "guess", "correction", "stopping"}:
        raise ValueError(f"{where}: give partition, guess, correction and stopping, and nothing else")
    try:
        return Solver(
            partition=_piece(_PARTITIONS, block["partition"]),
            guess=_piece(_GUESSES, block["guess"]),
            correction=_piece(_CORRECTIONS, block["correction"]),
            stopping=Stopping(**block["stopping"]),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _piece(kinds: Mapping[str, Callable[..., Any]], value: Any) -> Any:
    if not isinstance(value, dict) or value.get("kind") not in kinds:
        raise ValueError(f"{value!r}: 'kind' must be one of {', '.join(kinds)}")
    return kinds[value["kind"]](**{k: v for k, v in value.items() if k != "kind"})
