"""Strategies as data, and the one that the paper's Algorithm 1 makes of a report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import jacobiflow as jf
from jacobiflow.calibration import gs_jacobi_notation
from jacobiflow.calibration.metrics import Metrics
from jacobiflow.calibration.report import GUESSES
from jacobiflow.planner import Prediction
from jacobiflow.planner.strategy import device_name
from tests.helpers.invented import GUIDANCE, Counts, counted, curve_of, igm, make_report, same
from tests.helpers.running import put

pytestmark = pytest.mark.usefixtures("one_thread")

PLAN = jf.Strategy(
    (jf.Solver(jf.Segments(2), jf.Bf16Sweeps(3, jf.Zeros()), jf.Stopping((7, 4))), jf.Solver(tolerance_factor=0.5)),
    "f" * 64, 1e-3, Prediction("cpu", 4, GUIDANCE, 1.0, 2.0, 1e-4),
)  # fmt: skip


def test_a_strategy_comes_back_from_its_file(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    back = jf.Strategy.load(tmp_path / "plan.json")
    assert (back, back.fingerprint, back.prediction) == (PLAN, PLAN.fingerprint, PLAN.prediction)
    assert hash(back) == hash(PLAN) == hash(replace(PLAN, fingerprint=None))
    assert replace(PLAN, tolerance=None) != PLAN == replace(PLAN, fingerprint=None)


BROKEN: list[tuple[list[Any], Any, str]] = [
    (["format_version"], 1, "not a strategy of format_version 3; make it anew with jacobiflow plan"),
    (["solvers"], [], "solvers: 0 of them"),
    (["solvers", 0, "guess", "count"], -1, r"solvers\[0\]\.guess: .*count=-1"),
    (["solvers", 0, "bf16_sweeps"], 0, r"solvers\[0\]: 'bf16_sweeps' unknown"),
    (["prediction"], {}, "prediction: .*missing"),
    (["tolerance"], -1, "tolerance=-1"),
]


@pytest.mark.parametrize(("path", "new", "message"), BROKEN, ids=str)
def test_a_broken_file_is_one_error_that_names_the_place(path: Any, new: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(put(PLAN.to_json(), path, new)))
    with pytest.raises(ValueError, match=r"^strategy .*plan\.json: .*" + message):
        jf.Strategy.load(tmp_path / "plan.json")


def test_a_file_of_format_2_is_read_if_its_solvers_have_no_correction(tmp_path: Path) -> None:
    """Each of its solvers names one; "plain" is none."""
    old = PLAN.to_json() | {"format_version": 2}
    file, plain = tmp_path / "plan.json", {"kind": "plain"}
    file.write_text(json.dumps(put(put(old, ["solvers", 0, "correction"], plain), ["solvers", 1, "correction"], plain)))
    assert jf.Strategy.load(file) == PLAN
    for change, message in (
        ({"kind": "chord"}, "the correction 'chord' of a solver is retired; jacobiflow 0.1.0 is the last version with"),
        (7, "correction: Expected `object`, got `int`"),
    ):
        file.write_text(json.dumps(put(old, ["solvers", 1, "correction"], change)))
        with pytest.raises(ValueError, match=rf"^strategy {file}: {message}.*; make it anew with jacobiflow plan$"):
            jf.Strategy.load(file)


def test_a_strategy_has_up_to_1000_blocks() -> None:
    assert len(jf.Strategy.parse("jacobi", num_blocks=1000).solvers) == 1000
    with pytest.raises(ValueError, match="the limit is"):
        jf.Strategy.parse("jacobi", num_blocks=1001)
    with pytest.raises(ValueError, match="give a report, or num_blocks of the flow"):
        jf.Strategy.parse("jacobi")
    for num in (0, 1001):
        with pytest.raises(ValueError, match=f"solvers: {num} of them"):
            jf.Strategy((jf.Solver(),) * num)


def test_a_plan_is_for_a_gpu_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"the name of {device}")
    assert device_name(torch.device("cuda:1")) == "the name of cuda:1"
    assert device_name(torch.device("cpu")) == "cpu with 1 thread"


def test_the_tolerance_that_a_plan_was_made_for_stays() -> None:
    assert PLAN.with_tolerance(1e-3) == PLAN
    with pytest.raises(ValueError, match=r"tolerance=0\.01: the strategy was planned for 0\.001; plan again"):
        PLAN.with_tolerance(1e-2)


IGM_5 = [igm(5e5, 9.9), igm(7.2, 6.9), igm(3, 5), igm(math.inf, math.inf), igm(1, 1)]
LATENT = jf.Latent()
BEST_5 = [jf.Zeros(), jf.Zeros(), LATENT, LATENT, LATENT]  # of equals, the first


def test_a_report_gives_each_block_the_guess_of_the_smallest_igm() -> None:
    report = make_report([1] * 5, IGM_5, norm=1)
    for text in ("[0/4-4-3-2]", "window:4"):
        found, plain = jf.Strategy.parse(text, report), jf.Strategy.parse(text, num_blocks=5)
        assert [solver.guess for solver in found.solvers] == BEST_5
        assert [replace(solver, guess=LATENT) for solver in found.solvers] == list(plain.solvers)
        assert (found.fingerprint, plain.fingerprint) == (report.fingerprint, None)
    assert {solver.guess for solver in jf.Strategy.parse("jacobi+zeros", report).solvers} == {jf.Zeros()}


# ---------------------------------------------------------------------------------------- Algorithm 1, invented numbers

IMG64COND = (141.22, 9.25, 1.36, 1.82, 7.68, 5.08, 3.08, 19.81)  # CRM, Table 2 of the paper


def test_the_strategy_that_a_report_proposes() -> None:
    """Block 7: G = 8 is the cheapest. Block 0: what is within T // G costs more than the loop. Else: block 5's 6."""
    block_0 = {1: [same(200, 9)], 8: [same(33, 2), *[same(1, 1)] * 7], 16: [same(3, 15)] * 16}
    block_7 = {1: [same(64, 1)], 8: [same(4, 13), *[same(12, 3)] * 7], 16: [same(12, 12)] * 16}
    noise = [{"latent": same(2, 1 + block % 6), "zeros": same(50, 60)} for block in range(8)]
    noise[0] = noise[7] = dict.fromkeys(GUESSES, same(3, 200))
    report = make_report(IMG64COND, noise=noise, segments={0: block_0, 7: block_7}, num_tokens=256)
    found = jf.Strategy.from_report(report)
    assert gs_jacobi_notation(report) == "[0/7-256/8-1/13-6]"
    assert found == jf.Strategy.parse("[0/7-256/8-1/13-6]", report)
    assert found.fingerprint == report.fingerprint
    assert gs_jacobi_notation(report, per_segment=True) == "[0/7-256/8-1/13,12,12,12,12,12,12,12-6]"
    easy = make_report([2, 2, 2], noise=noise[:3])
    assert gs_jacobi_notation(easy) == "Jacobi-200"


def test_else_is_what_the_slowest_easy_block_needed_from_its_own_guess() -> None:
    """Of its best guess alone, and at least a sweep; T sweeps where a sample never got there; by the tolerance."""
    igms, slow = [igm(1, 2), igm(2, 1), igm(2, 1)], {1e-1: (2, 1), 1e-2: (3, 4), 1e-3: (5, 5), 1e-4: (None, 2)}
    rows = [(same(3, 7), same(2, 5), 1e-2, 7), (same(0, 0), same(0, 0), 1e-2, 1), (same(1, None), same(3, 7), 1e-2, 16)]
    rows += [
        (curve_of(slow), curve_of(slow), atol, sweeps) for atol, sweeps in ((1e-1, 2), (1e-2, 4), (1e-3, 5), (1e-4, 16))
    ]
    for first, second, tolerance, sweeps in rows:
        easy = [{"latent": same(9, 9), "zeros": each} for each in (first, second)]
        noise = [dict.fromkeys(GUESSES, same(16, 16)), *easy]
        report = make_report([90, 1, 1], igms, noise, {0: {1: [same(16, 16)]}})
        found = jf.Strategy.from_report(report, tolerance).solvers
        assert found[0] == counted(jf.Segments(16), 1)
        assert found[1:] == (replace(counted(jf.Whole(), sweeps), guess=jf.Zeros()),) * 2


def test_questions_that_a_report_cannot_answer_are_refused() -> None:
    report = make_report([90, 1, 1])
    for tolerance in (0.05, 0):
        with pytest.raises(ValueError, match=rf"tolerance {tolerance}: measured are 0\.1, 0\.01, 0\.001, 0\.0001"):
            jf.Strategy.from_report(report, tolerance)
    undefined = replace(report, metrics={norm: Metrics(m.igm, None) for norm, m in report.metrics.items()})
    with pytest.raises(ValueError, match="CRM is not defined"):
        jf.Strategy.from_report(undefined)
    assert jf.Strategy.parse("jacobi", undefined).solvers[0].guess == LATENT  # IGM alone is enough for a text


Way = tuple[float, int, int | tuple[int, ...]]  # to solve a tough block: its cost in tokens, segments, sweeps


def affordable(length: int, call_cost: float, measured: Mapping[int, Sequence[Counts]], per_segment: bool) -> list[Way]:
    """Every way that the measurements allow: those of at most T // G sweeps that all samples need, and the loop."""
    ways: list[Way] = [(length * (1 + call_cost), length, 1)]
    for count, rows in measured.items():
        each = [length + 1 if None in row else max(1, *(sweeps or 0 for sweeps in row)) for row in rows]
        if max(each) <= length // count:
            sweeps = each if per_segment else [max(each)] * count
            cost = sum(j * length / count + j * call_cost for j in sweeps)
            ways.append((cost, count, tuple(each) if per_segment and count > 1 else max(each)))
    return ways


@given(
    power=st.integers(0, 8), call_cost=st.sampled_from([0.0, 1.0, 32.0, 1000.0]), per_segment=st.booleans(),
    hard=st.floats(0, 1.3), data=st.data(),
)  # fmt: skip
def test_a_tough_block_gets_the_cheapest_of_what_was_measured(
    power: int, call_cost: float, per_segment: bool, hard: float, data: st.DataObject
) -> None:
    length, segments = 2**power, {}
    for count in sorted(data.draw(st.sets(st.sampled_from([2**k for k in range(power + 1)])))):
        most = min(max(1, math.ceil(hard * length / count)), length)
        one = st.integers(0, most) | (st.none() if data.draw(st.integers(0, 5)) == 0 else st.nothing())
        rows = data.draw(st.lists(st.tuples(one, one), min_size=min(count, 16), max_size=min(count, 16)))
        segments[count] = [same(*rows[i % len(rows)]) for i in range(count)]
    report = make_report((1.0, 90.0, 1.0), segments={1: segments}, num_tokens=length)
    found = jf.Strategy.from_report(report, 1e-2, per_segment=per_segment, call_cost=call_cost).solvers[1]
    found = replace(found, guess=LATENT)
    rows = {count: [row.sweeps[1e-2] for row in curves] for count, curves in segments.items()}
    ways = affordable(length, call_cost, rows, per_segment)
    (cost,) = {cost for cost, count, sweeps in ways if counted(jf.Segments(count), sweeps) == found}
    assert cost == pytest.approx(min(way[0] for way in ways))
