"""Any sequence of runs, kills, edits and other programs in the folder of a comparison, as in tests/storage.

What a shard cost is left out of what is compared.
"""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from problems import make_flow, to_float32
from sample_folders import FolderMachine, Killed, everything, facts, flip, invented, killed

from jacobiflow.baselines import SEQUENTIAL
from jacobiflow.experiments.quality import Experiment, begin, draw, folder, problems
from jacobiflow.locking import FolderInUseError, locked
from jacobiflow.storage import manifest

FLOW = to_float32(make_flow(image_size=4, num_classes=3))
NAMES = (SEQUENTIAL, "jacobi-1")
OWN = ("settings.json", "manifest.json", "strategy.json")  # which are restored, not drawn again
PLACES = ("mine.txt", "rows/mine/a.png", "rows/jacobi-1/shards/mine.npz", "exact/mine.npy", "plans/auto-mine.json")


def compare(out: Path, num: int, overwrite: bool = False, seed: int = 0) -> None:
    """Without its slow parts: images are invented, weights and machine are not looked at."""
    of = Experiment(FLOW, out, NAMES, torch.arange(num) % 3, seed, batch_size=2, shard_size=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("jacobiflow.experiments.quality.draw"), "draw_by_strategy", lambda *_: invented)
        for module in (manifest, folder):
            patch.setattr(module, "fingerprint", lambda _: 64 * "f")
        patch.setattr(manifest, "machine", lambda _: {})
        begin(of, overwrite)
        for name in NAMES:
            draw(of, name, num, progress=False)


def result(out: Path) -> Any:
    own = {name: held for name, held in everything(out).items() if not name.startswith("rows")}
    return own, [facts(out / "rows" / name) for name in NAMES]


@cache
def undisturbed(num: int) -> tuple[Any, dict[str, bytes]]:
    """The result, and the files of it that are the same each time."""
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), num)
        assert list(problems(Path(folder))) == []
        files = everything(Path(folder))
        return result(Path(folder)), {name: files[name] for name in files if name.endswith((".npz", *OWN))}


@pytest.mark.usefixtures("one_thread")
class Comparison(FolderMachine):
    """A comparison of two rows, in shards of 2, that many things happen to."""

    @initialize(num=st.integers(1, 3))
    def start(self, num: int) -> None:
        self.begin()
        self.num = num

    def teardown(self) -> None:
        if hasattr(self, "out"):
            self.restore()
            self.run()
            shutil.rmtree(self.out.parent)

    def attempt(self, after: int = 10**6, more: int = 0, overwrite: bool = False) -> None:
        before, num = everything(self.out), self.num + more
        self.num = num  # a row may have grown before the next one is refused
        try:
            with killed(after):
                compare(self.out, num, overwrite)
        except Killed:
            assert after < 10**6
        except ValueError as error:
            assert self.changed, error
            now, whole = everything(self.out), undisturbed(num)[1]
            kept = {name: held for name, held in whole.items() if before.get(name) == held}
            assert {name: now.get(name) for name in kept} == kept, "lost by a run that was refused"
        else:
            for name in self.foreign:
                (self.out / name).unlink()
            assert result(self.out) == undisturbed(num)[0]
            for name, held in self.foreign.items():
                (self.out / name).write_bytes(held)
        now = everything(self.out)
        self.changed = {name: held for name, held in self.changed.items() if now.get(name) == before.get(name)}
        assert {name: (self.out / name).read_bytes() for name in self.foreign} == self.foreign

    @rule()
    def run(self) -> None:
        self.attempt()

    @rule(after=st.integers(0, 30), more=st.integers(0, 1), overwrite=st.booleans())
    def killed(self, after: int, more: int, overwrite: bool) -> None:
        self.attempt(after, more, overwrite)

    @precondition(lambda self: (self.out / "settings.json").exists())
    @rule()
    def other_settings(self) -> None:
        before = everything(self.out)
        with pytest.raises(ValueError):
            compare(self.out, self.num, seed=1)
        assert everything(self.out) == before

    @precondition(lambda self: (self.out / "rows/jacobi-1/manifest.json").exists())
    @rule()
    def second_process(self) -> None:
        before = everything(self.out)
        with locked(self.out / "rows" / "jacobi-1"), pytest.raises(ValueError if self.changed else FolderInUseError):
            compare(self.out, self.num, overwrite=True)
        assert everything(self.out) == before

    @precondition(FolderMachine.ours)
    @rule(data=st.data(), harm=st.sampled_from([flip, Path.unlink]))
    def damage(self, data: st.DataObject, harm: Any) -> None:
        ours = self.ours()
        name = data.draw(st.sampled_from(sorted(name for name in ours if not name.endswith(".npy"))))
        if name.endswith(OWN):
            self.changed.setdefault(name, ours[name])
        harm(self.out / name)

    @precondition(lambda self: (self.out / "settings.json").exists())
    @rule(name=st.sampled_from(PLACES))
    def another_program(self, name: str) -> None:
        row = self.out / "rows" / "jacobi-1"  # shards in a row that has not begun are refused
        if name != PLACES[2] or (row / "manifest.json").exists():
            self.put(name)


Comparison.TestCase.settings = settings(
    max_examples=15, stateful_step_count=12, deadline=None, derandomize=True, phases=[Phase.generate]
)
test_a_comparison = pytest.mark.filterwarnings("ignore")(Comparison.TestCase)
