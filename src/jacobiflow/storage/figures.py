"""What drawing cost and how it ended, as JSON values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from jacobiflow.outcome import Outcome
from jacobiflow.sampling import Samples
from jacobiflow.solvers import Status
from jacobiflow.storage.folder import SampleFolder

_SUMS = ("seconds", "denoise_seconds", "network_calls", "token_evaluations", "resolved_sequentially")
_BY_BLOCK = ("sweeps", "block_seconds")


def figures_of(result: Samples) -> dict[str, Any]:
    """What a run cost, how many samples ended with which status, whether all are exact, and sweeps by block."""
    status = result.status
    return {
        "seconds": result.seconds,
        "denoise_seconds": result.denoise_seconds,
        "network_calls": result.network_calls,
        "token_evaluations": result.token_evaluations,
        "resolved_sequentially": result.resolved_sequentially,
        "exact": bool(result.exact.all()),
        "status": {state.name.lower(): int((status == state).sum()) for state in Status},
        "sweeps": [block.sweeps for block in result.stats],
        "block_seconds": [block.seconds for block in result.stats],
        "threads": torch.get_num_threads(),
    }


def total(shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The sum of `figures_of` over several shards; seconds are those of all processes together."""
    status = sum((Counter(each["status"]) for each in shards), Counter())
    return {
        **{name: sum(each[name] for each in shards) for name in _SUMS},
        "exact": all(each.get("exact", False) for each in shards),  # shards of an older version do not say
        "status": {state.name.lower(): status[state.name.lower()] for state in Status},
        **{name: [sum(column) for column in zip(*(each[name] for each in shards), strict=True)] for name in _BY_BLOCK},
    }


def outcome_of(folder: SampleFolder, num_tokens: int) -> Outcome:
    """The outcome of the samples in a folder, from the records of its shards and its strategy."""
    records, certificate = folder.records(), folder.certificate()
    cost = total([record.figures for record in records])
    return Outcome(
        num=folder.manifest.num,
        tolerance=folder.strategy().residual_bound(num_tokens),
        residual=None if certificate is None else float(certificate.nan_to_num(posinf=0.0).max()),
        exact=cost["exact"],
        resolved=cost["resolved_sequentially"],
        above=cost["status"]["rounding"],
        lost=cost["status"]["nonfinite"],
    )
