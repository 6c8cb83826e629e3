"""Messages with the names of options, and progress in logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jacobiflow.cli import output


def test_options_have_their_names_at_a_shell(run: Any, refuse: Any, tmp_path: Path) -> None:
    line = f"sample --model model --strategy jacobi-1 --certify-always --batch-size 2 --out {tmp_path}/out"
    refuse(f"{line} --num 4 --shard-size 3", "error: --shard-size 3: give a multiple of the batch size, 2\n")
    assert run(f"{line} --num 4").code == 0
    for options, words in {
        "--num 4 --seed 1": "holds samples of --seed 0, not 1; give another folder, or --overwrite to replace them",
        "--num 3": "samples, more than 3; give --num 4, or give another folder, or --overwrite to replace them",
        "--num 4 --guidance 0.5": "holds samples of no --guidance, not 0.5; give",
    }.items():
        refuse(f"{line} {options}", words)


def test_a_log_has_a_line_a_minute(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0, 0, 30, 61, 90, 150])
    monkeypatch.setattr(output, "perf_counter", lambda: next(seconds))
    lines = output.ProgressLines()
    for done in (200, 250, 300, 350, 450):
        lines(done, 1200, "samples")
    assert capsys.readouterr().err == (
        "samples: 300 of 1,200, about 9 min left\nsamples: 450 of 1,200, about 8 min left\n"
    )
