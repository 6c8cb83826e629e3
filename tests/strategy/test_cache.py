"""The strategy "auto": what it plans by, what makes it plan anew, and where plans are kept."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from invented import (
    GUIDANCE,
    TOKENS,
    Halfway,
    Machine,
    Stretched,
    claiming,
    draw,
    invented_block,
    make_report,
    make_tuning,
    run,
    small,
)

import jacobiflow as jf
import jacobiflow.strategy.cache as cache_module
from jacobiflow.errors import InputValueError
from jacobiflow.strategy import auto
from jacobiflow.strategy.memory import batch_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

LOOP = jf.Sequential()


def report(seed: int = 0) -> jf.Report:
    """By which sweeps to 1e-4 are a plan."""
    return replace(make_report([1, 1]), tuning=replace(claiming(run(jf.Whole(), 1e-4, 9, 1e-4)), seed=seed))


@dataclass
class Plans:
    """The folder of plans, a machine on which calls are dear, and what "auto" says."""

    folder: Path
    machine: Machine
    monkeypatch: pytest.MonkeyPatch
    said: list[str] = field(default_factory=list)

    @property
    def made(self) -> int:
        """How often a plan was made."""
        return sum("planning for" in line for line in self.said)

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.iterdir()) if self.folder.is_dir() else []

    def load(self, folder: Path | str, **named: Any) -> Any:
        return self.machine.carry(jf.load(folder, **named), self.monkeypatch)  # type: ignore[arg-type]

    def auto(self, flow: Any, batch_size: int = 1, *arguments: Any, **named: Any) -> jf.Strategy:
        return auto(flow, batch_size, *arguments, say=self.said.append, **named)

    def forget(self) -> None:
        """As a new process, which has no plan in memory."""
        importlib.reload(cache_module)


@pytest.fixture
def plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plans]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = Plans(tmp_path / "cache" / "jacobiflow" / "plans", Machine(1.0), monkeypatch)
    found.forget()
    yield found
    found.forget()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder with a tuned report."""
    small().save_pretrained(tmp_path / "model")
    report().save(tmp_path / "model" / "report.json")
    return tmp_path / "model"


def assert_near_the_loop(flow: Any, tolerance: float, num: int = 4) -> None:
    drawn, exact = draw(flow, "auto", num, tolerance=tolerance), draw(flow, "sequential", num)
    assert drawn.certificate is not None
    assert drawn.certificate.max() <= tolerance
    assert (drawn.images - exact.images).abs().max() <= 3 * tolerance


# ----------------------------------------------------------------------------------------------------------- kept plans


def test_a_plan_is_made_once_for_the_next_power_of_two_and_kept(model: Path, plans: Plans) -> None:
    flow = plans.load(model)
    first = plans.auto(flow, 3)
    assert plans.said == ["auto: planning for batches of up to 4 on cpu with 1 threads, once"]
    assert first == jf.plan(flow, report(), 4, 1e-3)
    (file,) = plans.files
    assert jf.Strategy.load(file) == first
    assert plans.auto(flow, 4, 1e-3, jf.Guidance(0.0)) == plans.auto(plans.load(model), 3) == first
    plans.forget()
    kept = plans.auto(plans.load(model), 4)
    assert (kept, kept.prediction, kept.fingerprint) == (first, first.prediction, first.fingerprint)
    assert (plans.made, plans.files) == (1, [file])
    for batch_size, planned in ((1, 1), (2, 2), (4, 4), (5, 8), (8, 8)):
        prediction = plans.auto(flow, batch_size).prediction
        assert prediction is not None
        assert prediction.batch_size == planned
    assert plans.made == len(plans.files) == 4


def test_what_a_plan_depends_on(model: Path, plans: Plans, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = plans.load(model)
    first, wide = plans.auto(flow), plans.load(model, dtype="float64")
    others: list[Callable[[], Any]] = [
        lambda: plans.auto(flow, 1, 1e-2),
        lambda: plans.auto(flow, 1, None, GUIDANCE),
        lambda: plans.auto(wide),
        lambda: plans.auto(flow, report=report(1)),
        lambda: report(2).save(model / "report.json"),
        lambda: torch.set_float32_matmul_precision("high"),  # TF32, where there is any
        lambda: torch.set_float32_matmul_precision("highest"),  # as before
        lambda: monkeypatch.setattr("jacobiflow.strategy.cache.library_name", lambda: "native-code.so"),
    ]
    for other, made in zip(others, (2, 3, 4, 5, 6, 7, 7, 8), strict=True):
        other()
        assert plans.auto(flow) == plans.auto(flow) == first
        assert plans.made == len(plans.files) == made
    # What does not change while a process runs.
    for name in ("machine", "_code"):
        monkeypatch.setattr(cache_module, name, lambda *_: "other")
        assert plans.auto(plans.load(model)) == first
    assert plans.made == len(plans.files) == 10
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="below the rounding"):
        plans.auto(flow)
    assert plans.made == 11


def test_a_plan_is_by_the_report_of_its_guidance(model: Path, plans: Plans) -> None:
    """Sweeps of the folder's guided report are counted on where that guidance is sampled with, and nowhere else."""
    guided = make_tuning(invented_block(0), invented_block(1), guidance=GUIDANCE)
    made = report()
    made = replace(made, settings=replace(made.settings, guidance=GUIDANCE), tuning=guided)
    made.save(model / "report-guided.json")
    flow = plans.load(model)
    assert plans.auto(flow) == jf.plan(flow, report(), 1) != plans.auto(flow, 1, None, GUIDANCE)
    assert plans.auto(flow, 1, None, GUIDANCE) == jf.plan(flow, guided, 1, guidance=GUIDANCE)


def test_a_kept_plan_that_is_damaged_is_made_anew(model: Path, plans: Plans) -> None:
    flow = plans.load(model)
    first, short = plans.auto(flow), jf.Strategy((jf.Solver(),)).to_json()["blocks"]
    (file,) = plans.files
    good = json.loads(file.read_text())
    for place, new in (("format_version", 0), ("prediction", None), ("fingerprint", "0" * 64), ("blocks", short)):
        made = plans.made
        file.write_text(json.dumps({**good, place: new}))
        plans.forget()
        assert plans.auto(flow) == first
        assert plans.made == made + 1
        assert jf.Strategy.load(file) == first


@pytest.mark.parametrize(("call", "token"), [(0.03, 0.0), (0.0, 0.01)], ids=["sweeps", "the loop"])
def test_a_plan_of_a_busy_machine_is_used_for_a_minute_and_not_written(
    call: float, token: float, model: Path, plans: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("jacobiflow.strategy.cache.time.monotonic", lambda: clock[0])
    for spread, made, written in ((0.31, 2, 0), (0.29, 3, 1)):
        plans.machine = Machine(call, token, low=1.0, moods=(1.0, 1.0 + spread, 1.0 + spread))
        flow = plans.load(model)
        for seconds in (0.0, 50.0, 20.0):
            clock[0] += seconds
            solvers = plans.auto(flow).solvers
            assert all((solver.partition == LOOP) == (token > 0) for solver in solvers)
        assert (plans.made, len(plans.files)) == (made, written)
        assert ("timings differ by 31%, the machine is busy; planning anew in a minute" in plans.said[-1]) != written


def test_a_plan_in_memory_is_found_without_reading_or_hashing_anything(
    model: Path, plans: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = plans.load(model)
    first = plans.auto(flow, 3)
    for name in ("io.open", "hashlib.sha256", "jacobiflow.strategy.memory.free_memory"):
        monkeypatch.setattr(name, None)
    assert plans.auto(flow, 3) is first
    with pytest.raises(TypeError, match="NoneType"):
        plans.auto(flow, 4)


def test_no_batch_is_planned_for_that_does_not_fit_in_memory(
    model: Path, plans: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = plans.load(model)
    needed = batch_bytes(flow, 1)
    assert needed is not None
    for room, planned in ((2.5, 3), (3.9, 3), (4.1, 4)):
        monkeypatch.setattr("jacobiflow.strategy.memory.free_memory", lambda device, room=room: room * needed / 0.8)
        prediction = plans.auto(plans.load(model), 3).prediction
        assert prediction is not None
        assert prediction.batch_size == planned


@pytest.mark.parametrize("place", ["no home", "a file in the way", "home"])
def test_where_plans_are_kept(place: str, model: Path, plans: Plans, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the home where no other place is named; what cannot be kept is used all the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(model / "config.json"))
    if place != "a file in the way":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("USERPROFILE" if os.name == "nt" else "HOME", str(model))
    if place == "no home":
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(pytest.importorskip("pwd"), "getpwuid", lambda uid: {}[uid])
    flow = plans.load(model)
    assert plans.auto(flow) == plans.auto(flow) == jf.plan(flow, report(), 1)
    assert (plans.made, plans.files) == (1, [])
    assert len(list(model.glob(".cache/jacobiflow/plans/*.json"))) == (place == "home")


# ---------------------------------------------------------------------------------------------- without a plan's report


def test_pieces_of_a_reader_s_own_are_planned_with(model: Path, plans: Plans) -> None:
    """From files, in which no correction turns into another."""
    tuning = claiming(run(Stretched(TOKENS), 1e-5, 9, 1e-5))
    blocks = (replace(block, guess=jf.Zeros(), correction=Halfway(100)) for block in tuning.blocks)
    replace(report(), tuning=replace(tuning, blocks=tuple(blocks))).save(model / "report.json")
    for _ in range(2):
        solvers = set(plans.auto(plans.load(model)).solvers)
        assert solvers == {jf.Solver(Stretched(TOKENS), jf.Zeros(), jf.Tolerance(1e-5), Halfway(100))}
        plans.forget()


def test_without_a_report_a_flow_is_tuned_by_a_short_trial(model: Path, plans: Plans) -> None:
    """Sweeps from the latent in all blocks, in one or in none: the loop solves those which it solves sooner."""
    (model / "report.json").unlink()
    rows = ((Machine(1.0), [0, 0]), (Machine(1.0, slower={1: 9.0}), [0, 1]), (Machine(0.0, 1.0), [1, 1]))
    for machine, left in rows:
        plans.machine = machine
        plans.forget()
        shutil.rmtree(plans.folder, ignore_errors=True)
        flow = plans.load(model)
        found = plans.auto(flow, 4, 1e-2)
        assert ("by a short trial" in plans.said[-1]) == (left != [1, 1])  # where the loop is the plan at once
        assert [solver.partition == LOOP for solver in found.solvers] == left
        assert {(solver.guess, solver.correction) for solver in found.solvers} == {(jf.Latent(), jf.Plain())}
        assert_near_the_loop(flow, 1e-2)
    make_report([1, 1]).save(model / "report.json")  # without a tuning
    assert plans.auto(plans.load(model), 4, 1e-2) == plans.auto(flow, 4, 1e-2, report=make_report([1, 1])) == found
    assert plans.made == 5


def test_a_report_of_other_weights_is_not_planned_by(model: Path, plans: Plans) -> None:
    flow = plans.load(model)
    plans.auto(flow, 4)
    flow.blocks[0].proj_out.bias.data.add_(0.1)  # fine-tuned in place
    with pytest.warns(UserWarning, match="the report in the flow's folder is of other weights: planned without it"):
        found = plans.auto(flow, 4)
    assert {solver.guess for solver in found.solvers} == {jf.Latent()}
    assert_near_the_loop(flow, 1e-3)
    with pytest.raises(ValueError, match=r"the report is of another flow.*calibrate this one"):
        plans.auto(flow, report=report())
    (model / "report.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"report .*report\.json"):
            plans.auto(flow, 4, 1e-4)
        (model / "report.json").unlink(missing_ok=True)


def test_a_tolerance_of_0_is_the_loop(model: Path, plans: Plans) -> None:
    flow = plans.load(model)
    assert plans.auto(flow, 4, 0) == jf.Strategy.uniform(jf.Solver(LOOP, stopping=jf.Tolerance(0)), 2)
    assert torch.equal(draw(flow, "auto", 3, tolerance=0).images, draw(flow, "sequential", 3).images)
    assert (plans.said, plans.files) == ([], [])


def test_a_flow_whose_latents_overflow_is_left_to_the_loop(model: Path, plans: Plans) -> None:
    (model / "report.json").unlink()
    flow = plans.load(model)
    flow.blocks[0].proj_out.bias.data[:4] = 200.0
    assert plans.auto(flow, 2, 1e-4) == jf.Strategy.uniform(jf.Solver(LOOP, stopping=jf.Tolerance(1e-4)), 2)
    assert "the sequential loop, since 4 of 4 fresh latents overflow" in plans.said[-1]
    with pytest.warns(UserWarning, match="2 samples: .*2 lost"):
        assert draw(flow, "auto", 2).images.isnan().any()


def test_a_wrong_input_to_a_trial_is_not_taken_for_an_overflow(
    model: Path, plans: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "report.json").unlink()

    def fit(*_: object, **named: object) -> None:
        raise InputValueError("a fault of a piece")

    monkeypatch.setattr(cache_module, "tune", fit)
    with pytest.raises(InputValueError, match="a fault of a piece"):
        plans.auto(plans.load(model))


def test_a_tolerance_that_was_raised_to_the_rounding_is_said(plans: Plans) -> None:
    flow = plans.load("digits-p1", dtype="bfloat16")
    with pytest.warns(UserWarning, match="below the rounding"):
        found = plans.auto(flow)
    for _ in range(2):
        assert (
            plans.said.pop() == f"auto: planned for a tolerance of {found.tolerance:.1e}, the rounding of the network"
        )
        assert plans.auto(flow) == found
    assert plans.made == 1


def test_real_weights(plans: Plans) -> None:
    """The bundled flow of digits: by its report and the real clock; and without, where a tough block gets a window."""
    digits = jf.load("digits-p1")
    assert_near_the_loop(digits, 1e-2, 1)
    digits.report_files, plans.machine = (), Machine(1.0, 0.03)
    flow = plans.machine.carry(digits, plans.monkeypatch)  # type: ignore[arg-type]
    found = plans.auto(flow, 2, 1e-2)
    assert {solver.partition for solver in found.solvers} == {jf.Whole(), jf.Window(32)}
    assert all(1e-4 <= (solver.stopping.atol or 0) <= 1e-2 for solver in found.solvers)
    assert_near_the_loop(flow, 1e-2, 2)
