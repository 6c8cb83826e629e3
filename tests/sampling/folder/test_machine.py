"""Any sequence of runs, kills, damage and other programs: finished work stays, nothing foreign changes.

The end is the folder of an undisturbed run, byte by byte, or a refusal that changes nothing.
"""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.helpers.sample_folders import Killed, everything, facts, flip, killed, run

WRITES = st.integers(0, 30)  # before a kill; a run makes about 10 to 25
PLACES = ("mine.txt", "shards/mine.json", "shards/0001.npz", "shards/00099.json", "images/1/9.png")


@cache
def undisturbed(num: int, files: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), num, files=files, shard_size=2)
        return facts(Path(folder)), everything(Path(folder))


class Samples(RuleBasedStateMachine):
    """A folder of samples, in shards of 2; `foreign` files must stay."""

    @initialize(files=st.sampled_from(["npz", "png"]), num=st.integers(1, 5))
    def start(self, files: str, num: int) -> None:
        self.out = Path(tempfile.mkdtemp()) / "out"
        self.foreign: list[str] = []
        self.files, self.num = files, num

    def teardown(self) -> None:
        if hasattr(self, "out"):
            self.run()
            shutil.rmtree(self.out.parent)

    def draw(self, **changed: Any) -> None:
        run(self.out, **{"num": self.num, "files": self.files, "shard_size": 2, **changed})

    def times(self, num: int) -> dict[str, int]:
        """When the files of the shards that are whole were written."""
        want, times = undisturbed(num, self.files)[1], {}
        for shard in range(0, num, 2):
            stems = {f"{shard // 2:05}", *(f"{i:08}" for i in range(shard, shard + 2))}
            names = [name for name in want if Path(name).stem in stems]
            if all((self.out / name).is_file() and (self.out / name).read_bytes() == want[name] for name in names):
                times |= {name: (self.out / name).stat().st_mtime_ns for name in names}
        return times

    def attempt(self, after: int = 10**6, more: int = 0, overwrite: bool = False) -> None:
        self.num += more
        before = {} if overwrite else self.times(self.num)
        try:
            with killed(after):
                self.draw(overwrite=overwrite)
        except Killed:
            pass
        else:
            assert facts(self.out, self.foreign) == undisturbed(self.num, self.files)[0]
        assert {name: (self.out / name).stat().st_mtime_ns for name in before} == before
        assert all((self.out / name).read_bytes() == b"{}" for name in self.foreign)

    @rule()
    def run(self) -> None:
        self.attempt()

    @rule(after=WRITES, more=st.integers(0, 2))
    def killed(self, after: int, more: int) -> None:
        self.attempt(after, more)

    @rule(more=st.integers(1, 4))
    def grow(self, more: int) -> None:
        self.attempt(more=more)

    @rule(after=WRITES)
    def overwrite(self, after: int) -> None:
        self.attempt(after, overwrite=True)

    @precondition(lambda self: self.ours())
    @rule(data=st.data(), harm=st.sampled_from([flip, Path.unlink]))
    def damage(self, data: st.DataObject, harm: Any) -> None:
        harm(self.out / data.draw(st.sampled_from(sorted(self.ours()))))

    def ours(self) -> list[str]:
        return [name for name in everything(self.out) if name not in self.foreign and name.endswith(("npz", "png"))]

    @precondition(lambda self: (self.out / "manifest.json").exists())
    @rule(name=st.sampled_from(PLACES))
    def another_program(self, name: str) -> None:
        (self.out / name).parent.mkdir(parents=True, exist_ok=True)
        (self.out / name).write_bytes(b"{}")
        self.foreign.append(name)


Samples.TestCase.settings = settings(
    max_examples=settings.default.max_examples // 5, stateful_step_count=12, phases=[Phase.generate]
)
test_a_folder_of_samples = pytest.mark.filterwarnings("ignore")(Samples.TestCase)
