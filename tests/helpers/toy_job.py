"""A job of two stages whose units take no time."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jacobiflow.jobs import Job, JobStore, Unit, UnitOutput, run
from jacobiflow.utils.layout import LAYOUTS
from jacobiflow.utils.progress import Progress
from tests.helpers.kills import read_files

LAYOUTS["digests"] = ("digest.json", "salt.bin", "[0-9]/*.bin")


@dataclasses.dataclass(frozen=True)
class Spec:
    num: int = 4
    seed: int = 0
    model_sha256: str = "a"


class Digests(Job):
    """Files and values of `num` units, which the value and the file of a first unit determine; the last one may grow.

    `before` is called with the name of a unit before it is computed.
    """

    kind, result_name, machine = "digests", "digest.json", {"threads": 1}

    def __init__(self, spec: Spec, before: Callable[[str], None] = lambda unit: None) -> None:
        self.spec, self.before = spec, before

    def stages(self, store: JobStore) -> Iterator[list[Unit]]:
        yield [self._unit("salt", UnitOutput({"salt.bin": bytes([self.spec.seed])}, self.spec.model_sha256))]
        salt = (store.path / "salt.bin").read_bytes() + store.value("salt").encode()
        hashes = {f"{i:05}": hashlib.sha256(salt + f"{i:05}".encode()).digest() for i in range(self.spec.num)}
        outputs = {name: UnitOutput({f"{name[-1]}/{x}.bin": h for x in "ab"}, h.hex()) for name, h in hashes.items()}
        yield [self._unit(*each) for each in (*outputs.items(), (f"count-{self.spec.num}", UnitOutput()))]

    def _unit(self, name: str, output: UnitOutput) -> Unit:
        def run(progress: Progress | None) -> UnitOutput:
            self.before(name)
            if progress is not None:
                progress(1, 2, "half")
            return output

        return Unit(name, run, size=2)

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
