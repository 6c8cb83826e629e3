"""What is kept of a shard beside its images."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from jacobiflow.errors import InputValueError
from jacobiflow.files import entries_sha256, finite

_MOST = 2**63  # of a label, which is kept as int64


@dataclass(frozen=True)
class Record:
    """What a shard holds, how its samples ended, and what it cost.

    **Attributes:**

    - `start`: its first sample; `num`: how many it holds.
    - `sha256`: of its file, or of its PNGs one after another.
    - `labels`: one per sample, `None` without.
    - `certificate`: the largest residual |g(x) - x| of each sample, `None` where none was asked for.
    - `resolved`: the samples that were solved again sequentially; `lost`: those whose exact inverse overflows, drawn
        black. Both are counted from the shard's first sample.
    - `figures`: its cost, see `jacobiflow.storage.figures`.
    """

    start: int
    num: int
    sha256: str
    labels: tuple[int, ...] | None
    certificate: tuple[float, ...] | None
    resolved: tuple[int, ...]
    lost: tuple[int, ...]
    figures: dict[str, Any]

    @classmethod
    def from_json(cls, value: Any) -> Record:
        """Inverse of `to_json`. **Raises** `ValueError` where `value` is not a record, or was changed."""
        try:
            entries = {name: entry for name, entry in value.items() if name != "record_sha256"}
            if value["record_sha256"] != entries_sha256(entries):
                raise InputValueError("does not match its own checksum")
            for name in ("labels", "certificate", "resolved", "lost"):
                entries[name] = None if entries[name] is None else tuple(entries[name])
            if entries["certificate"] is not None:
                entries["certificate"] = tuple(math.inf if v is None else v for v in entries["certificate"])
            record = cls(**entries)
            record._check()
            return record
        except (TypeError, KeyError, AttributeError) as error:
            raise InputValueError(f"not a record ({error})") from error

    def to_json(self) -> dict[str, Any]:
        """A JSON value with the checksum of all other entries; an infinite certificate, which JSON lacks, is null."""
        entries = finite(asdict(self))
        return {**entries, "record_sha256": entries_sha256(entries)}

    def _check(self) -> None:
        """**Raises** `ValueError` for an entry of a wrong type or length."""
        each = range(self.num)  # a TypeError where that is no number
        right = {
            "start": type(self.start) is int and self.start >= 0,
            "num": type(self.num) is int and self.num >= 1,
            "labels": self.labels is None
            or (
                _are(int, self.labels)
                and len(self.labels) == self.num
                and all(-_MOST <= i < _MOST for i in self.labels)
            ),
            "certificate": self.certificate is None
            or (_are((int, float), self.certificate) and len(self.certificate) == self.num),
            "resolved": _are(int, self.resolved) and all(i in each for i in self.resolved),
            "lost": _are(int, self.lost) and all(i in each for i in self.lost),
            "figures": isinstance(self.figures, dict),
        }
        for name, is_right in right.items():
            if not is_right:
                raise InputValueError(f"not a record (its {name})")


def _are(kinds: type | tuple[type, ...], values: Any) -> bool:
    return all(isinstance(value, kinds) and not isinstance(value, bool) for value in values)
