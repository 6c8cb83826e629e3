"""Progress in logs."""

from __future__ import annotations

import pytest

from jacobiflow.cli import output


def test_a_log_has_a_line_a_minute(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0, 30, 61, 61, 90, 150, 150])
    monkeypatch.setattr(output, "monotonic", lambda: next(seconds))
    with output.progress_bar() as progress:
        assert progress is not None
        for done in (200, 300, 350, 450):
            progress(done, 1200, "samples")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["samples", "samples"]
    assert ["300/1200" in lines[0], "450/1200" in lines[1]] == [True, True]
