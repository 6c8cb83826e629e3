"""Any sequence of runs, kills, edits and other programs: finished work is kept, nothing foreign changes.

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
from hypothesis.stateful import initialize, precondition, rule
from sample_folders import FolderMachine, Killed, everything, flip, killed, run

import jacobiflow as jf
from jacobiflow.locking import FolderInUseError, locked

WINDOW = jf.Strategy.uniform(jf.Solver(jf.Window(4)), 2)
WRITES = st.integers(0, 30)  # before a kill; a run makes about 10 to 25
PLACES = ("mine.txt", "shards/mine.json", "shards/0001.npz", "shards/00099.json", "shards/00004.npz", "images/1/9.png")


def draw(out: Path, num: int, files: str, **changed: Any) -> None:
    run(out, num, files=files, shard_size=2, plan=lambda: WINDOW, **changed)


@cache
def undisturbed(num: int, files: str) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), num, files)
        return everything(Path(folder))


class Samples(FolderMachine):
    """A folder of samples, in shards of 2, that many things happen to."""

    @initialize(files=st.sampled_from(["npz", "png"]), num=st.integers(1, 5))
    def start(self, files: str, num: int) -> None:
        self.begin()
        self.files, self.num = files, num

    def teardown(self) -> None:
        if hasattr(self, "out"):
            self.run()
            if self.changed:  # refused; the remedy is to restore them
                self.restore()
            self.run()
            shutil.rmtree(self.out.parent)

    def finished(self, num: int) -> dict[str, int]:
        """When the files of the shards that are whole were written."""
        want, found = undisturbed(num, self.files), {}
        for shard in range(0, num, 2):
            stems = {f"{shard // 2:05}", *(f"{i:08}" for i in range(shard, shard + 2))}
            names = [name for name in want if Path(name).stem in stems]
            if all((self.out / name).is_file() and (self.out / name).read_bytes() == want[name] for name in names):
                found |= {name: (self.out / name).stat().st_mtime_ns for name in names}
        return found

    def attempt(self, after: int | None = None, more: int = 0, refused: bool = False, **changed: Any) -> None:
        num, before = self.num + more, everything(self.out)
        kept = {} if changed.get("overwrite") else self.finished(num)
        try:
            with killed(10**6 if after is None else after):
                draw(self.out, num, self.files, **changed)
        except Killed:
            assert after is not None
            self.num, self.changed = num, {}
        except ValueError as error:
            blocked = more and "shards/00004.npz" in self.foreign
            assert refused or self.changed or blocked, error
            assert everything(self.out) == before
        else:
            assert not refused
            self.num, self.changed = num, {}
            assert everything(self.out) == undisturbed(num, self.files) | self.foreign
        assert {name: (self.out / name).stat().st_mtime_ns for name in kept} == kept
        assert {name: (self.out / name).read_bytes() for name in self.foreign} == self.foreign

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

    @precondition(lambda self: any(self.finished(self.num)))
    @rule(changed=st.sampled_from([{"seed": 1}, {"labels": False}, {"num": 0}, {"plan": None}]))
    def other_settings(self, changed: dict[str, Any]) -> None:
        before = everything(self.out)
        with pytest.raises(ValueError):
            run(self.out, **{"num": self.num, "files": self.files, "shard_size": 2, "plan": lambda: WINDOW, **changed})
        assert everything(self.out) == before

    @rule()
    def second_process(self) -> None:
        before = everything(self.out)
        with locked(self.out), pytest.raises(FolderInUseError):
            draw(self.out, self.num, self.files, overwrite=True)
        assert everything(self.out) == before

    @precondition(FolderMachine.ours)
    @rule(data=st.data(), harm=st.sampled_from([flip, Path.unlink]))
    def damage(self, data: st.DataObject, harm: Any) -> None:
        ours = self.ours()
        name = data.draw(st.sampled_from(sorted(ours)))
        if "/" not in name and not name.endswith(".partial"):
            self.changed.setdefault(name, ours[name])
        harm(self.out / name)

    @precondition(lambda self: (self.out / "manifest.json").exists())
    @rule(name=st.sampled_from(PLACES))
    def another_program(self, name: str) -> None:
        if name == "shards/00004.npz" and (self.num > 8 or self.files == "png"):
            return
        self.put(name)


Samples.TestCase.settings = settings(
    max_examples=12, stateful_step_count=12, deadline=None, derandomize=True, phases=[Phase.generate]
)
test_a_folder_of_samples = pytest.mark.filterwarnings("ignore")(Samples.TestCase)
