"""`resolve_strategy`: the strategy that a name, a file or a `Strategy` stands for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import jacobiflow as jf
from jacobiflow.planner import Auto, Prediction, auto, is_auto, resolve_strategy
from tests.helpers.invented import GUIDANCE, Machine, igm, make_report, small

pytestmark = pytest.mark.usefixtures("one_thread")

REPORT = make_report([1, 1], [igm(2, 1), igm(2, 3)])  # of `small`
COUNTED = jf.Solver(stopping=jf.Stopping(3))


def planned(device: str = "cpu with 1 thread", guidance: jf.Guidance | None = None) -> jf.Strategy:
    return jf.Strategy((jf.Solver(),) * 2, prediction=Prediction(device, 16, guidance, 1.0, 2.0, 0.0))


def test_auto_to_a_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = Machine(1.0).carry(small(), monkeypatch)
    want = auto(flow.guided(GUIDANCE), 2, 1e-2)
    assert want.tolerance == 1e-2
    for name, tolerance in (("auto:1e-2", None), (" AUTO:0.01 ", 1e-2), ("auto", 1e-2)):
        resolved = resolve_strategy(name, flow, 2, tolerance)
        assert isinstance(resolved, Auto)
        assert auto(flow.guided(GUIDANCE), 2, resolved.tolerance) is want
    assert resolve_strategy("auto", flow, 2).tolerance == 1e-3
    for name, tolerance, message in (
        ("auto:", None, "strategy 'auto:': give auto, or auto:TOLERANCE such as auto:1e-2"),
        ("auto:nan", None, "tolerance=nan"),
        ("auto:1e-2", 1e-3, r"'auto:1e-2' with tolerance 0\.001: give the tolerance once"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve_strategy(name, flow, 2, tolerance)
    assert [name for name in ("auto", "Auto:1", "auto.json", "automatic", "") if is_auto(name)] == ["auto", "Auto:1"]


def test_a_name_a_file_and_a_strategy(tmp_path: Path) -> None:
    own = jf.Strategy((jf.Solver(jf.Window(3), jf.Zeros()), COUNTED))
    own.save(tmp_path / "own.json")
    for given in (own, tmp_path / "own.json", str(tmp_path / "own.json")):
        assert resolve_strategy(given, small(), 8) == own
    assert resolve_strategy("window:3", small(), 8) == jf.Strategy.parse("window:3", num_blocks=2)


@pytest.mark.parametrize("given", ["jacobi", "gs-jacobi:3-2", jf.Strategy((COUNTED, jf.Solver()), tolerance=0.5)])
def test_a_tolerance_replaces_that_of_a_strategy(given: Any) -> None:
    own, found = (resolve_strategy(given, small(), 1, tolerance) for tolerance in (None, 1e-6))
    assert isinstance(own, jf.Strategy)
    assert own.tolerance == {"jacobi": 1e-3, "gs-jacobi:3-2": None}.get(given, 0.5)
    assert found == replace(own, tolerance=1e-6)


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    ("gs-jacobi:17", {}, "strategy, block 0: .*only 16 tokens"),
    ("plan.txt", {}, "strategy 'plan.txt': unknown"), ("missing.json", {}, "strategy missing.json: cannot be read"),
    (jf.Strategy.uniform(COUNTED, 3), {}, "strategy for 3 blocks, but the flow has 2"),
    (jf.Strategy.uniform(jf.Solver(), 2, None), {}, "strategy, block 0: tolerance=None: nothing would end the sweeps"),
    (jf.Strategy.uniform(jf.Solver(jf.Segments(17)), 2), {}, "strategy, block 0: .*only 16 tokens"),
    (jf.Strategy.parse("jacobi", replace(REPORT, fingerprint="0" * 64)), {}, "the strategy was made for another"),
    (planned(), {"batch_size": 17}, "planned for batches of up to 16, not 17: plan again, or give a smaller batch"),
    (planned(), {"flow": small().guided(GUIDANCE)}, "planned for guidance None, not 0.4.*plan again"),
    (planned("Abacus"), {}, "planned for device Abacus, not cpu with 1 thread: plan again"),
]  # fmt: skip


@pytest.mark.parametrize(("strategy", "named", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_bad_arguments_are_refused(strategy: Any, named: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_strategy(**{"flow": small(), "strategy": strategy, "batch_size": 16, **named})
