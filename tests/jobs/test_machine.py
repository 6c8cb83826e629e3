"""Any sequence of runs, kills, damage and other programs: finished units stay, and nothing foreign changes.

The end is the folder of an undisturbed run, byte by byte, or a refusal that changes nothing.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from jacobiflow.errors import InputValueError
from jacobiflow.jobs import run
from tests.helpers.kills import Killed, flip, killed, read_files
from tests.helpers.toy_job import Digests, Spec, undisturbed

WRITES = st.integers(0, 50)  # Before a kill; a run makes about 10 to 50.
FOREIGN = ("mine.txt", "units/mine.txt", "1/mine.txt", "1/2/3.bin", "salt.binary", ".0.partial")


class Machine(RuleBasedStateMachine):
    """A folder of a job; `foreign` has the files of other programs."""

    @initialize(num=st.integers(1, 4))
    def start(self, num: int) -> None:
        self.out, self.foreign = Path(tempfile.mkdtemp()) / "out", set[str]()
        self.attempt(Spec(num), 0)
        self.attempt(Spec(num), 2)

    def teardown(self) -> None:
        if hasattr(self, "out"):
            self.attempt(self.spec())
            assert [path.name for path in self.out.glob(".lock*")] == [".lock"]
            shutil.rmtree(self.out.parent)

    def spec(self) -> Spec:
        return Spec(**(Digests.store(self.out).read_spec() or {}))

    def times(self) -> dict[str, int]:
        return {name: (self.out / name).stat().st_mtime_ns for name in read_files(self.out)}

    def finished(self) -> set[str]:
        """The files of the units of which no file is missing or damaged."""
        want, have, names = undisturbed(self.spec()), read_files(self.out), set[str]()
        for unit in ("salt", *"0123456789"):
            files = {name for name in want if re.match(rf"units/0*{unit}\.|{unit}[./]", name)}
            names |= files if all(have.get(name) == want[name] for name in files) else set()
        return names

    def attempt(self, spec: Spec, after: int = 10**6, overwrite: bool = False) -> None:
        kept = self.foreign if overwrite else self.foreign | self.finished()
        times = self.times() if kept else {}
        try:
            with killed(after):
                run(Digests(spec), self.out, overwrite=overwrite)
        except Killed:
            pass
        else:
            assert read_files(self.out, self.foreign) == undisturbed(spec)
        assert {name: self.times().get(name) for name in kept} == {name: times[name] for name in kept}

    @rule(after=WRITES, more=st.sampled_from([0, 0, 1, 3]))
    def run(self, after: int, more: int) -> None:
        self.attempt(dataclasses.replace(self.spec(), num=min(self.spec().num + more, 9)), after)

    @rule(after=WRITES, spec=st.builds(Spec, st.integers(1, 4), st.integers(0, 1)))
    def overwrite(self, after: int, spec: Spec) -> None:
        self.attempt(spec, after, overwrite=True)

    @rule()
    def refuse_another_spec(self) -> None:
        num, seed = self.spec().num, self.spec().seed
        self.refuse(
            Spec(num - 1, 7, "b"), f"num {num}, not {num - 1}; seed {seed}, not 7; different model; give another"
        )

    @rule()
    def refuse_a_damaged_manifest(self) -> None:
        flip(self.out / "manifest.json")
        self.refuse(Spec(), "")
        flip(self.out / "manifest.json")

    @rule(after=WRITES, spec=st.builds(Spec, st.integers(1, 4)), harm=st.sampled_from(["kind", "version", "cut"]))
    def replace_another_job(self, after: int, spec: Spec, harm: str) -> None:
        manifest = self.out / "manifest.json"
        before = manifest.read_bytes()
        new = {"kind": (b'"digests"', b'"evaluation"'), "version": (b'_version": 1', b'_version": 9')}
        manifest.write_bytes(before[: after % 40] if harm == "cut" else before.replace(*new[harm]))
        if any(not name.startswith(".") for name in self.foreign):
            there = read_files(self.out)
            with pytest.raises(InputValueError, match="not written by a job of jacobiflow"):
                run(Digests(spec), self.out, overwrite=True)
            assert read_files(self.out) == there
            manifest.write_bytes(before)
            return
        with suppress(Killed), killed(after):
            run(Digests(spec), self.out, overwrite=True)
        run(Digests(spec), self.out, overwrite=True)
        assert read_files(self.out, self.foreign) == undisturbed(spec)

    def refuse(self, spec: Spec, message: str) -> None:
        before = read_files(self.out), self.times()
        with pytest.raises(InputValueError, match=re.escape(message)):
            run(Digests(spec), self.out)
        assert (read_files(self.out), self.times()) == before

    @precondition(lambda self: self.finished())
    @rule(data=st.data(), harm=st.sampled_from([flip, Path.unlink]))
    def damage(self, data: st.DataObject, harm: Callable[[Path], None]) -> None:
        harm(self.out / data.draw(st.sampled_from(sorted(self.finished()))))
        if data.draw(st.booleans()):
            (self.out / "digest.json").unlink(missing_ok=True)

    @rule(name=st.sampled_from(FOREIGN))
    def another_program(self, name: str) -> None:
        (self.out / name).parent.mkdir(parents=True, exist_ok=True)
        (self.out / name).write_bytes(b"{}")
        self.foreign.add(name)


Machine.TestCase.settings = settings(stateful_step_count=15, phases=[Phase.generate])
test_a_job = pytest.mark.filterwarnings("ignore")(Machine.TestCase)
