"""Any sequence of runs, kills, damage and files of others ends as an undisturbed run, or is refused as a whole."""

from __future__ import annotations

import shutil
import signal
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import jacobiflow as jf
from jacobiflow.data import ImageDataset
from jacobiflow.training import TrainingConfig, TrainMetrics, train
from jacobiflow.training.checkpoint import last_step
from tests.helpers.kills import Killed, killed
from tests.helpers.training_runs import assert_same_run, contents, error_of

CONFIG = jf.MAFConfig(1, 2, hidden_features=4, num_blocks=1, hidden_layers=1)
SETTINGS = TrainingConfig(4, batch_size=4, warmup=2, bf16=False, checkpoint_every=2)
OURS = ("manifest.json", "metrics.jsonl", "config.json", "model.safetensors", "checkpoint.safetensors")


@cache
def undisturbed() -> Path:
    out = Path(tempfile.mkdtemp()) / "run"
    fit(out)
    return out


def fit(out: Path, **calls: Any) -> None:
    torch.manual_seed(3)
    pixels = torch.randint(256, (12, 1, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    train(jf.MAF(CONFIG), ImageDataset(pixels, None), SETTINGS, out, **calls)


class Training(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.out = self.folder / "run"
        self.foreign: dict[str, bytes] = {}
        self.metrics_lost = False

    def done(self) -> int:
        return last_step(self.out)

    def go(self, stop: int = 99) -> None:
        """A run that ends at the step after `stop`; steps that the checkpoint holds must not be done again."""
        expected = self.done()

        def on_step(report: TrainMetrics) -> None:
            nonlocal expected
            expected += 1
            assert report.step == expected
            if report.step == stop:
                signal.raise_signal(signal.SIGINT)

        fit(self.out, on_step=on_step)

    @rule(stop=st.integers(1, 5))
    def interrupt(self, stop: int) -> None:
        done = self.done()
        try:
            self.go(stop)
        except KeyboardInterrupt:
            assert self.done() == stop + 1
        else:
            assert stop <= done or stop + 1 >= SETTINGS.steps
            assert self.done() == SETTINGS.steps

    @rule(after=st.integers(0, 22))
    def kill(self, after: int) -> None:
        done = self.done()
        try:
            with killed(after):
                self.go()
        except Killed:
            assert self.done() >= done

    @precondition(lambda self: (self.out / "manifest.json").exists())
    @rule(name=st.sampled_from(["notes.txt", "README.md", "samples-000004.png", "metrics.json", "sub/manifest.json"]))
    def put_a_foreign_file(self, name: str) -> None:
        path = self.out / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"mine")
            self.foreign[name] = b"mine"

    @rule(name=st.sampled_from(OURS), how=st.sampled_from(["deleted", "cut", "foreign"]))
    def damage(self, name: str, how: str) -> None:
        """It is refused, until the file is back; or what is lost is made again."""
        path = self.out / name
        if not path.exists():
            return
        shutil.copy(path, self.folder / "copy")
        if how == "deleted":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-9] if how == "cut" else b"mine\n")
        before = contents(self.out)
        try:
            self.go()
        except ValueError as error:
            assert name in str(error) or name in ("manifest.json", "config.json")
            assert contents(self.out) == before
            shutil.copy(self.folder / "copy", path)
        else:
            assert how != "foreign" or name == "model.safetensors"  # beside our config
            self.metrics_lost |= name == "metrics.jsonl"

    @precondition(lambda self: self.out.exists())
    @rule()
    def another_process_trains(self) -> None:
        before = contents(self.out)
        with FileLock(self.out / ".lock"):
            assert "another run is writing to it; wait for it, stop it, or give another folder" in error_of(self.go)
        assert contents(self.out) == before

    @invariant()
    def foreign_files_are_as_they_were(self) -> None:
        assert {name: (self.out / name).read_bytes() for name in self.foreign} == self.foreign

    def teardown(self) -> None:
        self.go()
        want = undisturbed()
        files = {path.name for path in want.iterdir()} | {name.split("/")[0] for name in self.foreign}
        assert {path.name for path in self.out.iterdir()} - {"metrics.jsonl"} == files - {"metrics.jsonl"}
        assert_same_run(self.out, want, with_metrics=not self.metrics_lost)
        self.foreign_files_are_as_they_were()
        shutil.rmtree(self.folder)


test_training_whatever_happens = pytest.mark.usefixtures("one_thread")(Training.TestCase)
test_training_whatever_happens.settings = settings(
    max_examples=settings.default.max_examples // 2, stateful_step_count=8, suppress_health_check=list(HealthCheck)
)
