"""Progress in logs."""

from __future__ import annotations

import pytest

from jacobiflow.cli import output


def test_a_log_has_a_line_a_minute(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0, 0, 30, 61, 90, 150])
    monkeypatch.setattr(output, "perf_counter", lambda: next(seconds))
    lines = output.ProgressLines()
    for done in (200, 250, 300, 350, 450):
        lines(done, 1200, "samples")
    assert capsys.readouterr().err == (
        "samples: 300 of 1,200, about 9 min left\nsamples: 450 of 1,200, about 8 min left\n"
    )
