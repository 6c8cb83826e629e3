"""A job of two stages whose units take no time."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jacobiflow.jobs import Job, JobStore, UnitOutput, run
from jacobiflow.utils.progress import Progress
from tests.helpers.kills import read_files


@dataclasses.dataclass(frozen=True)
class Spec:
    num: int = 4
    seed: int = 0
    model_sha256: str = "a"


class Digests(Job):
    """Files and values of `num` units, which the value and the file of a first unit determine; the last one may grow.

    `before` is called with the name of a unit before it is computed.
    """

    kind, result_name, patterns, machine = "digests", "digest.json", ("salt.bin", "[0-9]/*.bin"), {"threads": 1}

    def __init__(self, spec: Spec, before: Callable[[str], None] = lambda unit: None) -> None:
        self.spec, self.before = spec, before

    def stages(self, store: JobStore) -> Iterator[Mapping[str, int]]:
        yield {"salt": 1}
        yield {f"{i:05}": 2 for i in range(self.spec.num)} | {f"count-{self.spec.num}": 1}

    def compute(self, unit: str, store: JobStore, progress: Progress | None) -> UnitOutput:
        self.before(unit)
        if unit == "salt":
            return UnitOutput({"salt.bin": bytes([self.spec.seed])}, self.spec.model_sha256)
        if unit.startswith("count"):
            return UnitOutput()
        if progress is not None:
            progress(1, 2, "half")
        digest = hashlib.sha256((store.path / "salt.bin").read_bytes() + store.value("salt").encode() + unit.encode())
        return UnitOutput({f"{unit[-1]}/{name}.bin": digest.digest() for name in "ab"}, digest.hexdigest())

    def reduce(self, store: JobStore) -> Any:
        return {"digests": [store.value(f"{i:05}") for i in range(self.spec.num)]}

    def earlier_spec(self, earlier: Mapping[str, Any]) -> Spec:
        return dataclasses.replace(self.spec, num=min(self.spec.num, earlier["num"]))


@cache
def undisturbed(spec: Spec) -> dict[str, bytes]:
    """The files of the job in a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        run(Digests(spec), folder)
        return read_files(Path(folder))
